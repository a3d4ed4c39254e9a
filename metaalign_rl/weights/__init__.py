"""Weights on their way from the learners to the rollout engines: in buckets, versioned, checksummed and confirmed.

An engine confirms an update with its version and the checksum of the tensors that its loader received (`confirm`). A
checksum cannot show that the loader put them in place; comparing log-probabilities can (`assert_fresh`).
"""

from metaalign_rl.weights.verify import StaleEngine, assert_fresh, confirm

__all__ = ["StaleEngine", "assert_fresh", "confirm"]
