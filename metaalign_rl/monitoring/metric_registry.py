"""The registry of a PPO step's metrics: the keys of `metrics.jsonl`, and the names that Ray exports to Prometheus.

`docs/metrics.md` explains them, and a test compares it with this module. A metric that is not registered is still
logged and plotted, but not exported.
"""

import re
from dataclasses import dataclass
from typing import Literal

# Means over a step's responses. They also exist by tier and relation, as tier/NAME/METRIC and relation/NAME/METRIC.
RESPONSE_METRICS = {
    "reward": "mean reward of the responses",
    "proxy": "mean probability p from the reward model",
    "gold": "share of responses that pass their checks",
    "kl": "KL to the reference policy, nats per token",
    "surprisal": "mean of -log p of the sampled tokens, nats per token",
    "refused": "share of responses that are refusals",
    "response_tokens": "mean length of a response, tokens",
}
# One value per step.
STEP_METRICS = {
    "step": "the last finished step",
    "unfinished": "share of responses truncated at rollout.max_new_tokens",
    "retokenized": "share of responses whose text has other tokens than were sampled",
    "penalty": "mean of what was subtracted from the rewards for the responses' length",
    "skipped_groups": "share of prompts left out of the loss because their responses all have the same reward",
    "held_out_gold": "share of greedy responses to held-out prompts that pass their checks",
    "held_out_reward": "mean reward of these responses",
    "held_out_unfinished": "share of these responses truncated at rollout.max_new_tokens",
    "entropy": "the policy's exact entropy, nats per token",
    "mismatch": "mean absolute difference of log p of engine and learner on the same tokens, nats, of the worst engine",
    "staleness": "mean number of updates between the weights that sampled a response's first token and the learners'",
    "staleness_max": "the same, for the oldest response",
    "kl_coef": "coefficient of the KL penalty",
    "alarm": "1 while an alarm is active: reward hacking or an exploding KL",
    "faults": "number of faults in the run so far",
    "reward_faults": "number of those faults that hit a reward worker",
    "policy_loss": "clipped policy loss",
    "value_loss": "clipped value loss",
    "clip_ratio": "share of tokens whose gain was clipped",
    "approx_kl": "mean of log p before the update minus log p during it, nats per token",
    "kl_loss": "KL term of the loss, before its coefficient, nats",
    "rollout_kl": "KL of the engine's policy to the learners' policy, nats per token, with learner.correction",
    "corrected": "share of tokens, or of responses, outside learner.correction_bounds",
    "grad_norm": "norm of the policy's gradient before clipping",
    "critic_grad_norm": "norm of the critic's gradient before clipping",
    "explained_variance": "share of the returns' variance that the critic predicts",
    "lr": "learning rate of the policy's next optimizer step",
    "critic_lr": "learning rate of the critic's next optimizer step",
}
# Settings that alerts compare the metrics with. They are exported once, when the run starts.
EXPORTED_SETTINGS = {
    "steps": "ppo.steps, the number of steps",
    "max_mismatch": "the mismatch above which the run stops, nats",
}
SAMPLES = "samples"  # number of responses in the step; a counter
STEP_SECONDS = "seconds_step"  # a histogram
# The parts of a step's time. They sum to `seconds_step`. One counter per part.
PARTS = {
    "rollout": "generating responses",
    "reward": "waiting for scores after the last response",
    "reference": "log-probabilities by policy and reference, values by the critic",
    "learn": "updating policy and critic",
    "transfer": "sending the new weights to the engines",
    "evaluate": "answering the held-out prompts",
    "idle": "everything else",
}

PREFIX = "metaalign_ppo_"
SECONDS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # buckets of the histogram of a step's time
ALL = "all"  # value of the tags `tier` and `relation` for metrics over all responses

_BY_TAG = re.compile(r"(tier|relation)/([^/]+)/(.+)")


@dataclass(frozen=True, slots=True)
class Exported:
    """A metric for Prometheus. Ray adds `ray_` before its name, and `_total` after the name of a counter."""

    kind: Literal["gauge", "counter", "histogram"]
    description: str
    tags: tuple[str, ...]


EXPORTED: dict[str, Exported] = {
    **{PREFIX + name: Exported("gauge", text, ("run", "tier", "relation")) for name, text in RESPONSE_METRICS.items()},
    **{
        PREFIX + name: Exported("gauge", text, ("run",)) for name, text in {**STEP_METRICS, **EXPORTED_SETTINGS}.items()
    },
    PREFIX + "samples": Exported("counter", "responses generated", ("run",)),
    PREFIX + "finished": Exported("counter", "1 after the last step", ("run",)),
    PREFIX + "seconds": Exported("counter", "seconds of the steps, by part", ("run", "part")),
    PREFIX + "step_seconds": Exported("histogram", "seconds per step", ("run",)),
}


def split(key: str) -> tuple[str, dict[str, str]]:
    """Split a key of `metrics.jsonl` into the metric's name and its tags: `tier/user/kl` is `kl` of the tier `user`."""
    found = _BY_TAG.fullmatch(key)
    if found is None:
        return key, {"tier": ALL, "relation": ALL}
    tag, value, name = found.groups()
    return name, {"tier": ALL, "relation": ALL, tag: value}


def is_known(key: str) -> bool:
    """Whether a key of `metrics.jsonl` is registered."""
    name, _ = split(key)
    if name != key:
        return name in RESPONSE_METRICS
    return name in {*RESPONSE_METRICS, *STEP_METRICS, SAMPLES, STEP_SECONDS, *(f"seconds_{part}" for part in PARTS)}
