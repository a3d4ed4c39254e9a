"""The metrics of a step's rollouts."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from metaalign_rl.core.dataflow import Batch, Metrics, Rollout
from metaalign_rl.core.refusals import is_refusal
from metaalign_rl.ppo.advantages import token_kl


class Measured(NamedTuple):
    """A rollout with sums over its response's tokens.

    Attributes:
        kl: KL to the reference, nats.
        surprisal: sum of -log p, nats.
        tokens: number of tokens.
    """

    rollout: Rollout
    kl: float
    surprisal: float
    tokens: float


def rollout_metrics(rollouts: Sequence[Rollout], batch: Batch, version: int) -> Metrics:
    """Metrics of a step's rollouts, over all of them and by tier and relation.

    `reward`, `proxy`, `gold` and `refused` are means over the responses. `response_tokens` is their mean length. `kl`
    and `surprisal` are in nats per token; `surprisal` is the mean of -log p of the sampled tokens, an estimate of the
    entropy. `staleness` is the mean number of updates between the weights that sampled a response's first token and
    `version`; `staleness_max` is the largest.

    Args:
        batch: the rollouts' tokens, evaluated.
        version: version of the learners' weights before the update.
    """
    assert batch.logprobs is not None and batch.ref_logprobs is not None
    kl = token_kl(batch.logprobs, batch.ref_logprobs, batch.action_mask)
    sums = (tensor.sum(dim=1).tolist() for tensor in (kl, -batch.logprobs, batch.action_mask))
    measured = [Measured(*found) for found in zip(rollouts, *sums, strict=True)]
    metrics = _means(measured, "")
    for name, key in (("tier", lambda r: r.row.tier), ("relation", lambda r: r.row.relation)):
        for value in sorted({key(rollout) for rollout in rollouts}):
            metrics |= _means([m for m in measured if key(m.rollout) == value], f"{name}/{value}/")
    if any(penalties := [rollout.reward.penalty for rollout in rollouts]):
        metrics["penalty"] = fmean(penalties)
    behind = [version - rollout.sample.first_version for rollout in rollouts]
    return metrics | {
        "samples": len(rollouts),
        "unfinished": fmean(not rollout.sample.finished for rollout in rollouts),
        "retokenized": fmean(rollout.sample.retokenized for rollout in rollouts),
        "staleness": fmean(behind),
        "staleness_max": max(behind),
    }


def _means(measured: Sequence[Measured], prefix: str) -> Metrics:
    rewards = [m.rollout.reward for m in measured]
    columns: dict[str, list[float]] = {
        "reward": [reward.value for reward in rewards],
        "proxy": [reward.proxy for reward in rewards if reward.proxy is not None],
        "gold": [float(reward.gold) for reward in rewards if reward.gold is not None],
        "refused": [float(is_refusal(m.rollout.sample.text)) for m in measured],
        "response_tokens": [m.tokens for m in measured],
    }
    means = {prefix + name: fmean(values) for name, values in columns.items() if values}
    tokens = sum(m.tokens for m in measured)
    sums = {"kl": sum(m.kl for m in measured), "surprisal": sum(m.surprisal for m in measured)}
    return means | {prefix + name: total / tokens for name, total in sums.items()}
