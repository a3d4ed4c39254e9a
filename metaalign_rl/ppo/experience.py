"""From rows to experience: roll out, score while others still roll out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from metaalign_rl.learner.batch import Batch
from metaalign_rl.reward_worker import Reward
from metaalign_rl.rollout.pool import EnginePool
from metaalign_rl.rollout.types import Request, Sample, Sampling
from metaalign_rl.schema import Row
from metaalign_rl.weights import StaleEngine, assert_fresh, mismatch


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer with the row that asked for it and what it is worth."""

    row: Row
    sample: Sample
    reward: Reward


def roll_out(
    pool: EnginePool, scorers: Sequence[Any], rows: Sequence[Row], prompts: Sequence[list[int]], sampling: Sampling
) -> list[Rollout]:
    """One answer to each row, in the rows' order; finished ones are scored while others still roll out."""
    samples: dict[int, Sample] = {}
    scored: list[tuple[list[int], Any]] = []
    waiting: list[Sample] = []
    chunk = max(1, len(rows) // (4 * len(scorers)))

    def send() -> None:
        indices = [sample.index for sample in waiting]
        scorer = scorers[len(scored) % len(scorers)]
        scored.append((indices, scorer.score.remote([rows[i] for i in indices], [s.text for s in waiting])))
        waiting.clear()

    for finished in pool.generate([Request(index, ids) for index, ids in enumerate(prompts)], sampling):
        waiting += finished
        samples |= {sample.index: sample for sample in finished}
        if len(waiting) >= chunk:
            send()
    if waiting:
        send()
    rewards: dict[int, Reward] = {}
    for (indices, _), answers in zip(scored, ray.get([answer for _, answer in scored]), strict=True):
        rewards |= dict(zip(indices, answers, strict=True))
    return [Rollout(row, samples[index], rewards[index]) for index, row in enumerate(rows)]


def to_batch(rollouts: Sequence[Rollout], pad_id: int) -> Batch:
    """The rollouts' tokens and the engine's log-probabilities as one padded batch."""
    samples = [rollout.sample for rollout in rollouts]
    return Batch.from_samples(
        [(sample.prompt_ids, sample.response_ids) for sample in samples],
        pad_id,
        [sample.logprobs for sample in samples],
    )


def worst_mismatch(batch: Batch, rollouts: Sequence[Rollout], version: int, limit: float) -> float:
    """The mean |Δ log p| a token between learner and engine, of the engine where it is largest.

    Each engine by itself: in a mean over all of them one stale engine of many would hide.

    Raises:
        StaleEngine: an engine drew from weights of another version, or is above `limit`; names the engine.
    """
    assert batch.rollout_logprobs is not None and batch.logprobs is not None
    rows_of: dict[int, list[int]] = {}
    for row, rollout in enumerate(rollouts):
        rows_of.setdefault(rollout.sample.engine, []).append(row)
    found = []
    for engine, rows in sorted(rows_of.items()):
        name = f"rollout engine {engine}"
        versions = {rollouts[row].sample.weight_version for row in rows}
        if versions != {version}:
            raise StaleEngine(
                f"{name} drew answers from weight version {min(versions - {version})}, not from the learners' {version}"
            )
        found.append(mismatch(batch.rollout_logprobs[rows], batch.logprobs[rows], batch.action_mask[rows]))
        assert_fresh(found[-1], limit, version, name)
    return max(found)
