"""Whether each engine sampled from the weights that it should have.

The learner and the engine compute the log-probability of the same tokens. If the engine's weights are stale or were
loaded wrongly, the two differ by more than rounding does.
"""

from collections.abc import Sequence

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Batch, Rollout
from metaalign_rl.weights import StaleEngine, assert_fresh, mismatch


def check_engines(batch: Batch, rollouts: Sequence[Rollout], version: int, config: Config) -> float:
    """The mismatch of the worst engine: its mean |Δ log p| per token, in nats.

    Each engine is checked on its own: in a mean over many engines, a stale one would not be visible. With
    `ppo.staleness`, samples from older weights may differ by more, because the policy itself has moved.

    Args:
        batch: evaluated; its rows are the rollouts.
        version: version of the learners' weights.

    Raises:
        StaleEngine: an engine sampled from another version, or its mismatch is above `config.max_mismatch`.
    """
    assert batch.rollout_logprobs is not None and batch.logprobs is not None
    staleness = config.ppo.staleness
    found = []
    for engine, rows in sorted(_rows_by_engine(rollouts).items()):
        name = f"rollout engine {engine}"
        check_versions(name, {rollouts[row].sample.weight_version for row in rows}, version, staleness)
        found.append(mismatch(batch.rollout_logprobs[rows], batch.logprobs[rows], batch.action_mask[rows]))
        if staleness == 0:
            assert_fresh(found[-1], config.max_mismatch, version, name)
    return max(found)


def check_versions(engine: str, versions: set[int], current: int, staleness: int) -> None:
    """Check the versions of the weights that an engine sampled from.

    Raises:
        StaleEngine: one is not among the last `staleness` + 1 versions up to `current`.
    """
    for version in sorted(versions):
        if not current - staleness <= version <= current:
            allowed = f"{current - staleness} to {current}" if staleness else f"{current}"
            raise StaleEngine(f"{engine} sampled from weight version {version}, expected version {allowed}")


def _rows_by_engine(rollouts: Sequence[Rollout]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, rollout in enumerate(rollouts):
        rows.setdefault(rollout.sample.engine, []).append(row)
    return rows
