"""The learners' settings. Imports no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from metaalign_rl.core.settings import PLAIN, require, require_at_least, require_options, require_positive, setting

HEAD_LOGITS = 2**25  # logits that a learner computes at a time: a row of the vocabulary's size for each token


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """How the policy and the critic are updated. The same on every rank.

    The fields `correction*` are OpenRLHF's `is_correction_level` and its companions. They need
    `Batch.rollout_logprobs`; docs/ppo.md has the formulas and sources.
    """

    world_size: int = setting(1, "Number of learner ranks. Each rank has one device.", unit="count", level="core")
    learning_rate: float = setting(
        1e-6, "AdamW's learning rate for the policy, after the warm-up.", unit=PLAIN, level="core"
    )
    critic_learning_rate: float = setting(
        5e-6, "AdamW's learning rate for the critic, after the warm-up.", unit=PLAIN, level="core"
    )
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's betas.", unit=PLAIN)
    weight_decay: float = setting(0.0, "AdamW's weight decay.", unit=PLAIN)
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant",
        "Schedule of the learning rates after the warm-up. With `linear` and `cosine` they fall to zero by the end of "
        "the run.",
    )
    warmup_steps: int = setting(
        0, "Optimizer steps over which the learning rates rise from zero.", unit="optimizer steps"
    )
    total_steps: int | None = setting(
        None,
        "Optimizer steps of the run, for the schedule. `null` computes them from the `ppo` settings.",
        unit="optimizer steps",
    )
    max_grad_norm: float = setting(
        1.0,
        "A larger gradient is scaled down to this norm. The policy and the critic each have their own norm.",
        unit=PLAIN,
    )
    epochs: int = setting(1, "Passes over each batch of samples.", unit="passes")
    minibatch_size: int = setting(
        128,
        "Samples per optimizer step, over all ranks. A batch that is not a multiple of it is split into nearly equal "
        "minibatches of at most this many samples.",
        unit="samples",
        level="core",
    )
    micro_batch_tokens: int = setting(
        16384,
        "Tokens, with padding, of one forward and backward pass on one rank. A longer sequence gets its own pass.",
        unit="tokens",
        level="core",
    )
    share_prompts: bool = setting(
        False,
        "Compute each prompt once for all its responses. This is faster if prompts are longer than responses. With "
        "longer responses it costs more, because attention must skip the other responses.",
    )
    old_logprobs: Literal["learner", "engine"] = setting(
        "learner",
        "Source of the old log-probabilities: `learner` computes them in an extra pass over every batch, `engine` "
        "takes them from the rollout engine and saves that pass. With `engine`, the ratio of new to old probabilities "
        "also corrects the numerical difference between learner and engine.",
    )
    clip_low: float = setting(
        0.2, "Lower clip range: the policy ratio is clipped to [1 - clip_low, 1 + clip_high].", unit=PLAIN
    )
    clip_high: float = setting(
        0.2, "Upper clip range: the policy ratio is clipped to [1 - clip_low, 1 + clip_high].", unit=PLAIN
    )
    dual_clip: float | None = setting(
        None, "Bound on the loss of negative advantages, above 1 (arXiv:1912.09729). `null` turns it off.", unit=PLAIN
    )
    value_clip: float | None = setting(
        0.2,
        "Bound on how far a value may move from the old value. `null` uses the plain squared error.",
        unit="reward",
    )
    loss_aggregation: Literal["tokens", "samples"] = setting(
        "tokens",
        "How the policy loss is averaged: over all response tokens equally, or over samples, each of which is the mean "
        "of its own tokens, as in the GRPO paper.",
    )
    correction: Literal["off", "token", "sequence"] = setting(
        "off",
        "Importance weights for responses from other weights than the learner's: the probability of each token under "
        "the learner divided by its probability under the rollout engine. The bounds apply to each token (`token`) or "
        "to the complete response (`sequence`). `off` uses no such weights. docs/ppo.md has the formulas.",
    )
    correction_mode: Literal["clip", "mask"] = setting(
        "mask",
        "What happens outside the bounds: `clip` moves the weight to the bound (only per token and with the ratio), "
        "`mask` leaves the token or sequence out of the loss.",
    )
    correction_gate: Literal["ratio", "binary_kl", "tv"] = setting(
        "ratio",
        "The quantity that must be within the bounds: the `ratio`, or a divergence between learner and engine at the "
        "sampled tokens (`binary_kl` or `tv`). For a sequence it is the geometric mean of the ratio, or the mean of "
        "the divergence.",
    )
    correction_bounds: tuple[float, float] = setting(
        (0.5, 5.0), "Lower and upper bound of the gate. The lower bound of a divergence is 0.", unit=PLAIN
    )
    spike_limit: float | None = setting(
        None,
        "Stop the training when a gradient norm or value loss is above this many times its running mean. `null` turns "
        "it off.",
        unit="times",
    )
    entropy_coef: float = setting(0.0, "Weight of the entropy, which is subtracted from the loss.", unit=PLAIN)
    zero_stage: Literal[0, 1, 2, 3] = setting(
        2,
        "DeepSpeed ZeRO stage. Stage 1 shards the optimizer states over the ranks, stage 2 also the gradients, stage 3 "
        "also the weights.",
        unit=PLAIN,
        level="core",
    )
    offload_optimizer: bool = setting(False, "Keep the optimizer states in main memory. Needs a zero_stage above 0.")
    offload_states: bool = setting(
        False,
        "Keep the float32 weights and the optimizer states in main memory while the engines generate, and move them to "
        "the GPU for each update. Leaves engines on the learners' GPUs more room. Needs a zero_stage of 1 or 2.",
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass. This saves memory and takes a third more time."
    )

    lora_rank: int = setting(
        0,
        "Rank of LoRA adapters. If it is above 0, only adapters of the policy are trained, and the policy without them "
        "is the reference. Use a learning rate about ten times as high. 0 trains all weights.",
        unit=PLAIN,
    )
    lora_alpha: float = setting(32.0, "The adapters' update is scaled by lora_alpha / lora_rank.", unit=PLAIN)

    def __post_init__(self) -> None:
        require_positive(self, "learner.", ("learning_rate", "critic_learning_rate", "max_grad_norm", "lora_alpha"))
        require_at_least(self, "learner.", 0, ("lora_rank",))
        require_at_least(self, "learner.", 1, ("world_size", "epochs", "minibatch_size", "micro_batch_tokens"))
        require_options(self, "learner.")
        for name in ("dual_clip", "spike_limit"):
            self._require(name, getattr(self, name) is None or getattr(self, name) > 1, "a number above 1, or null")
        self._require("clip_low", 0 < self.clip_low <= 1, "a number above 0 and at most 1")
        self._require("clip_high", self.clip_high > 0, "a number above 0")
        self._require("value_clip", self.value_clip is None or self.value_clip > 0, "a number above 0, or null")
        self._check_correction()
        long_enough = self.total_steps is None or self.total_steps > self.warmup_steps
        self._require("total_steps", long_enough, f"more than learner.warmup_steps={self.warmup_steps}")
        # Without ZeRO, DeepSpeed does not offload.
        can_offload = self.zero_stage > 0 or not self.offload_optimizer
        self._require("zero_stage", can_offload, "1, 2 or 3 with learner.offload_optimizer=true")
        # Under ZeRO-3, DeepSpeed moves only the states of its own AdamW, which is compiled at first use.
        can_move = self.zero_stage in (1, 2) or not self.offload_states
        self._require("zero_stage", can_move, "1 or 2 with learner.offload_states=true")
        is_there = self.offload_optimizer and self.offload_states
        self._require("offload_states", not is_there, "false with learner.offload_optimizer=true")

    def _check_correction(self) -> None:
        if self.correction == "off":
            return
        correction = f"learner.correction={self.correction}"
        has_both = self.old_logprobs == "learner"
        self._require("old_logprobs", has_both, f"learner with {correction}, which compares learner and engine")
        low, high = self.correction_bounds
        self._require("correction_bounds", 0 <= low < high, "two numbers from 0 up, the second one larger")
        is_ratio = self.correction_gate == "ratio"
        can_clip = self.correction == "token" and is_ratio
        needs_mask = "mask, because clip needs learner.correction=token and learner.correction_gate=ratio"
        self._require("correction_mode", self.correction_mode == "mask" or can_clip, needs_mask)
        starts_at_0 = f"0 as the lower bound with learner.correction_gate={self.correction_gate}"
        self._require("correction_bounds", is_ratio or low == 0, starts_at_0)

    def _require(self, name: str, good: bool, expected: str) -> None:
        require(f"learner.{name}", good, expected, getattr(self, name))

    def check_dtype(self, dtype: str) -> None:
        """Check that these settings can train weights of `dtype`.

        Raises:
            UserError: bfloat16 without ZeRO; DeepSpeed's optimizer for it differs from the one with ZeRO.
        """
        good = dtype != "bfloat16" or self.zero_stage > 0
        self._require("zero_stage", good, "1, 2 or 3 with model.dtype=bfloat16")

    def rate_factor(self, step: int) -> float:
        """The factor on the learning rates at optimizer step `step`, from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        assert self.total_steps is not None
        left = max(0.0, (self.total_steps - step) / (self.total_steps - self.warmup_steps))
        return left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
