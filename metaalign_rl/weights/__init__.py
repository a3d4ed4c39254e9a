"""Weights on their way from the learners to the rollout engines: bucket by bucket, versioned, checksummed, confirmed.

An engine answers an update with its version and the checksum of the tensors that its loader took (`confirm`). What a
checksum cannot show, whether the loader did its work, the log-probabilities can (`mismatch`, `assert_fresh`).
"""

from metaalign_rl.weights.verify import StaleEngine, assert_fresh, confirm, mismatch

__all__ = ["StaleEngine", "assert_fresh", "confirm", "mismatch"]
