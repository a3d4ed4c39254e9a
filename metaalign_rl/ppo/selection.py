"""Which responses of a step enter the loss."""

from collections.abc import Sequence

from metaalign_rl.config.schema import PPOConfig
from metaalign_rl.core.dataflow import Metrics, Rollout

EQUAL = 1e-6  # rewards that differ by less are equal: a model's scores vary by rounding


def select(rollouts: Sequence[Rollout], config: PPOConfig) -> tuple[list[int], Metrics]:
    """The indices of the rollouts that enter the loss, and a metric.

    Left out are truncated responses with `ppo.unfinished=mask` (as in DAPO, arXiv:2503.14476, section 3.4), and with
    `ppo.skip_equal_groups` prompts whose responses all have the same reward (section 3.2, without sampling others in
    their place). A truncated response still counts in its prompt's mean and deviation.

    Returns: the indices, in order; `skipped_groups` with `ppo.skip_equal_groups`: the share of prompts left out.
    """
    rows = {rollout.row.id for rollout in rollouts}
    skipped = equal_groups(rollouts) if config.skip_equal_groups else set()
    learned = [
        index
        for index, rollout in enumerate(rollouts)
        if rollout.row.id not in skipped and (rollout.sample.finished or config.unfinished != "mask")
    ]
    return learned, {"skipped_groups": len(skipped) / len(rows)} if config.skip_equal_groups else {}


def equal_groups(rollouts: Sequence[Rollout]) -> set[str]:
    """The ids of the rows whose responses all have the same reward."""
    rewards: dict[str, list[float]] = {}
    for rollout in rollouts:
        rewards.setdefault(rollout.row.id, []).append(rollout.reward.value)
    return {row for row, found in rewards.items() if max(found) - min(found) < EQUAL}
