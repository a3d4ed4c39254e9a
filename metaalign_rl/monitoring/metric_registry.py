"""Every metric of a PPO step, named once: what `metrics.jsonl` holds, and what Ray exports to Prometheus.

`docs/metrics.md` explains them; a test holds the two together. A metric that is not here is kept and drawn, but not
exported.
"""

import re
from dataclasses import dataclass
from typing import Literal

# Means over a step's answers, which come again as tier/NAME/METRIC and relation/NAME/METRIC.
ANSWERS = {
    "reward": "mean reward of the answers",
    "proxy": "mean p that the reward model gives them",
    "gold": "share of them that pass their checks",
    "kl": "KL to the reference policy, nats a token",
    "surprisal": "mean of -log p of the drawn tokens, nats a token",
    "refused": "share of answers that decline",
    "response_tokens": "mean length of an answer, tokens",
}
# One figure a step.
STEP = {
    "step": "the last step that was done",
    "unfinished": "share of answers cut at rollout.max_new_tokens",
    "entropy": "the policy's exact entropy, nats a token",
    "mismatch": "mean difference of log p between engine and learner at the same tokens, nats, of the worst engine",
    "staleness": "updates that the weights of an answer's first token were behind, mean",
    "staleness_max": "the same, the answer furthest behind",
    "kl_coef": "coefficient of the KL penalty",
    "alarm": "1 while the curves show reward hacking or an exploding KL",
    "faults": "faults of the run so far",
    "reward_faults": "those of them that hit a reward worker",
    "policy_loss": "clipped policy loss",
    "value_loss": "clipped value loss",
    "clip_ratio": "share of tokens at which clipping cut the gain",
    "approx_kl": "mean of log p before the update less log p during it, nats a token",
    "kl_loss": "KL of the loss, before its coefficient, nats",
    "rollout_kl": "KL of the policy that rolled out to the one that learns, nats a token, under correction",
    "corrected": "share of tokens, or of answers, outside learner.correction_bounds",
    "grad_norm": "norm of the policy's gradient before clipping",
    "critic_grad_norm": "norm of the critic's gradient before clipping",
    "explained_variance": "share of the returns' variance that the critic foresaw",
    "lr": "learning rate of the policy's next step",
    "critic_lr": "learning rate of the critic's next step",
}
# What the run is set to, told once at its start: what alerts compare the above with.
SETTINGS = {
    "steps": "ppo.steps, the step that is the last",
    "max_mismatch": "the mismatch above which the run stops, nats",
}
SAMPLES = "samples"  # how many answers the step has; a counter
STEP_SECONDS = "seconds_step"  # a histogram
# Where the step's time went; they sum to `seconds_step`. Counters, one for each part.
PARTS = {
    "rollout": "engines answer",
    "reward": "waiting for scores that rolling out did not hide",
    "reference": "log p by policy and reference, values by the critic",
    "learn": "updates of policy and critic",
    "transfer": "weights to the engines",
    "idle": "none of these",
}

PREFIX = "metaalign_ppo_"
SECONDS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # buckets of a step's time
ALL = "all"  # the tags `tier` and `relation` of a figure over all answers

_CUT = re.compile(r"(tier|relation)/([^/]+)/(.+)")


@dataclass(frozen=True, slots=True)
class Exported:
    """One name for Prometheus. Ray puts `ray_` before it, and `_total` behind a counter's."""

    kind: Literal["gauge", "counter", "histogram"]
    description: str
    tags: tuple[str, ...]


EXPORTED: dict[str, Exported] = {
    **{PREFIX + name: Exported("gauge", text, ("run", "tier", "relation")) for name, text in ANSWERS.items()},
    **{PREFIX + name: Exported("gauge", text, ("run",)) for name, text in {**STEP, **SETTINGS}.items()},
    PREFIX + "samples": Exported("counter", "answers drawn", ("run",)),
    PREFIX + "finished": Exported("counter", "1 once the last step is done", ("run",)),
    PREFIX + "seconds": Exported("counter", "seconds of the steps, by where they went", ("run", "part")),
    PREFIX + "step_seconds": Exported("histogram", "seconds of a step", ("run",)),
}


def split(key: str) -> tuple[str, dict[str, str]]:
    """A key of `metrics.jsonl` as the metric's name and its tags: `tier/user/kl` is `kl` of the tier `user`."""
    found = _CUT.fullmatch(key)
    if found is None:
        return key, {"tier": ALL, "relation": ALL}
    cut, value, name = found.groups()
    return name, {"tier": ALL, "relation": ALL, cut: value}


def is_known(key: str) -> bool:
    """Whether a key of `metrics.jsonl` is one of these."""
    name, _ = split(key)
    if name != key:
        return name in ANSWERS
    return name in {*ANSWERS, *STEP, SAMPLES, STEP_SECONDS, *(f"seconds_{part}" for part in PARTS)}
