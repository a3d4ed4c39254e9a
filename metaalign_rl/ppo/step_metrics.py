"""What a step's answers are like, as the figures that `metrics.jsonl` keeps."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from metaalign_rl.core.dataflow import Batch, Metrics, Rollout
from metaalign_rl.core.refusals import is_refusal
from metaalign_rl.ppo.advantages import token_kl


class Measured(NamedTuple):
    """A rollout with its sums over the answer's tokens: nats of KL, nats of surprisal, and how many they are."""

    rollout: Rollout
    kl: float
    surprisal: float
    tokens: float


def describe(rollouts: Sequence[Rollout], batch: Batch, version: int) -> Metrics:
    """What the step's answers are like, all together and by tier and relation.

    `reward`, `proxy`, `gold` and `refused` are means over the answers, `response_tokens` is the mean length; `kl` and
    `surprisal`, the mean of -log p of the drawn tokens and so an estimate of the entropy, are in nats a token.
    `staleness` is how many updates the weights that drew an answer's first token were behind the learners'.

    Args:
        version: of the learners' weights before they learn from these answers.
    """
    assert batch.logprobs is not None and batch.ref_logprobs is not None
    kl = token_kl(batch.logprobs, batch.ref_logprobs, batch.action_mask)
    sums = (tensor.sum(dim=1).tolist() for tensor in (kl, -batch.logprobs, batch.action_mask))
    answers = [Measured(*found) for found in zip(rollouts, *sums, strict=True)]
    metrics = _means(answers, "")
    for name, key in (("tier", lambda r: r.row.tier), ("relation", lambda r: r.row.relation)):
        for value in sorted({key(rollout) for rollout in rollouts}):
            metrics |= _means([answer for answer in answers if key(answer.rollout) == value], f"{name}/{value}/")
    behind = [version - rollout.sample.first_version for rollout in rollouts]
    return metrics | {
        "samples": len(rollouts),
        "unfinished": fmean(not rollout.sample.finished for rollout in rollouts),
        "staleness": fmean(behind),
        "staleness_max": max(behind),
    }


def _means(answers: Sequence[Measured], prefix: str) -> Metrics:
    rewards = [answer.rollout.reward for answer in answers]
    columns: dict[str, list[float]] = {
        "reward": [reward.value for reward in rewards],
        "proxy": [reward.proxy for reward in rewards if reward.proxy is not None],
        "gold": [float(reward.gold) for reward in rewards if reward.gold is not None],
        "refused": [float(is_refusal(answer.rollout.sample.text)) for answer in answers],
        "response_tokens": [answer.tokens for answer in answers],
    }
    means = {prefix + name: fmean(values) for name, values in columns.items() if values}
    tokens = sum(answer.tokens for answer in answers)
    sums = {"kl": sum(answer.kl for answer in answers), "surprisal": sum(answer.surprisal for answer in answers)}
    return means | {prefix + name: total / tokens for name, total in sums.items()}
