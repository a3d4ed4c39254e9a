"""The learner's settings. Light: no torch."""

from dataclasses import dataclass
from typing import Literal

from metaalign_rl.core.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """Settings of one learner, the same on every rank.

    Attributes:
        world_size: learner ranks, one a device.
        learning_rate, critic_learning_rate: of AdamW, after the warm-up.
        betas: AdamW's.
        weight_decay: AdamW's.
        schedule: of the learning rates after the warm-up; "linear" falls to zero at the run's end.
        total_steps: optimizer steps of the whole run, for the linear schedule; null: what `ppo` comes to.
        warmup_steps: optimizer steps over which the learning rates rise from zero.
        max_grad_norm: a larger gradient is scaled down to this norm, policy's and critic's each.
        epochs: passes over each batch of experience.
        minibatch_size: samples of one optimizer step over all ranks. A batch that is not a multiple of it is
            cut into nearly equal minibatches of at most this many samples.
        micro_batch_tokens: padded tokens of one forward and backward pass on one rank. A longer sequence goes
            alone.
        share_prompts: answers to the same prompt share one pass over it. Worth it where prompts are longer than
            answers; longer answers pay for looking past each other.
        old_logprobs: whose log-probabilities of the drawn tokens the update starts from: the learner's, in a pass of
            its own over every batch, or those that the rollout engine said as it drew them, which saves that pass. Then
            the ratio of new to old also makes up for what the two compute differently.
        clip_low, clip_high: the policy ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: bound on the loss of negative advantages (arXiv:1912.09729), above 1; null: off.
        value_clip: bound on a value's move away from the old value; null: plain squared error.
        loss_aggregation: what the policy's loss is a mean of: all response tokens alike, or samples, each the mean of
            its own tokens, as in the GRPO paper.
        correction: weights each token's loss with its probability under the learner over that under the rollout
            engine, for answers of other weights than the learner's; "token" and "sequence" say what is kept
            in bounds, "off" takes the answers for its own. Needs `Batch.rollout_logprobs`. OpenRLHF's
            is_correction_level; docs/ppo.md has the formulas and sources.
        correction_mode: what happens outside of the bounds: "clip" moves the weight to the bound (by token and ratio
            only), "mask" leaves the token or sequence out.
        correction_gate: what is kept in bounds: the "ratio" itself (its geometric mean, by sequence), or a
            divergence between the two at the drawn tokens, "binary_kl" or "tv" (its mean, by sequence).
        correction_bounds: least and most of it; a divergence's least is 0.
        spike_limit: a gradient norm or value loss above this many times its running mean ends the training; null: off.
        entropy_coef: weight of the entropy, which is subtracted from the loss.
        zero_stage: DeepSpeed ZeRO stage: 1 shares the optimizer's states among the ranks, 2 the gradients too, 3 the
            weights too.
        offload_optimizer: keep the optimizer's states in main memory; needs a zero_stage above 0.
        gradient_checkpointing: recompute activations in the backward pass, which saves memory for a third more time.
    """

    world_size: int = 1
    learning_rate: float = 1e-6
    critic_learning_rate: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear"] = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    max_grad_norm: float = 1.0
    epochs: int = 1
    minibatch_size: int = 128
    micro_batch_tokens: int = 16384
    share_prompts: bool = False
    old_logprobs: Literal["learner", "engine"] = "learner"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    loss_aggregation: Literal["tokens", "samples"] = "tokens"
    correction: Literal["off", "token", "sequence"] = "off"
    correction_mode: Literal["clip", "mask"] = "mask"
    correction_gate: Literal["ratio", "binary_kl", "tv"] = "ratio"
    correction_bounds: tuple[float, float] = (0.5, 5.0)
    spike_limit: float | None = None
    entropy_coef: float = 0.0
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("learning_rate", "critic_learning_rate", "max_grad_norm"):
            self._require(name, getattr(self, name) > 0, "a number above 0")
        for name in ("world_size", "epochs", "minibatch_size", "micro_batch_tokens"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name, allowed in (
            ("zero_stage", (0, 1, 2, 3)),
            ("schedule", ("constant", "linear")),
            ("loss_aggregation", ("tokens", "samples")),
            ("old_logprobs", ("learner", "engine")),
        ):
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(map(str, allowed))}")
        for name in ("dual_clip", "spike_limit"):
            self._require(name, getattr(self, name) is None or getattr(self, name) > 1, "above 1, or nothing")
        self._require("clip_low", 0 < self.clip_low <= 1, "above 0, at most 1")
        self._require("clip_high", self.clip_high > 0, "above 0")
        self._require("value_clip", self.value_clip is None or self.value_clip > 0, "above 0, or nothing")
        self._check_correction()
        long_enough = self.total_steps is None or self.total_steps > self.warmup_steps
        self._require("total_steps", long_enough, "more than warmup_steps")
        # Without ZeRO, DeepSpeed does not offload.
        self._require("zero_stage", self.zero_stage > 0 or not self.offload_optimizer, "1, 2 or 3 for offloading")

    def _check_correction(self) -> None:
        for name, allowed in (
            ("correction", ("off", "token", "sequence")),
            ("correction_mode", ("clip", "mask")),
            ("correction_gate", ("ratio", "binary_kl", "tv")),
        ):
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        if self.correction == "off":
            return
        own = self.old_logprobs == "learner"
        self._require("old_logprobs", own, f"learner under correction={self.correction}, which compares the two")
        low, high = self.correction_bounds
        self._require("correction_bounds", 0 <= low < high, "0 or more, and more than that")
        ratio = self.correction_gate == "ratio"
        good = self.correction_mode == "mask" or (self.correction == "token" and ratio)
        self._require("correction_mode", good, "mask, since clip moves the ratio of a token alone")
        self._require("correction_bounds", ratio or low == 0, f"0 first under correction_gate={self.correction_gate}")

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"learner.{name}: expected {expected}, found {getattr(self, name)!r}")

    def check_dtype(self, dtype: str) -> None:
        """Refuse a dtype of the weights that these settings cannot train.

        Raises:
            UserError: bfloat16 without ZeRO, where DeepSpeed has not the same optimizer as with it.
        """
        good = dtype != "bfloat16" or self.zero_stage > 0
        self._require("zero_stage", good, "1, 2 or 3 under model.dtype=bfloat16")

    def rate_factor(self, step: int) -> float:
        """The factor on the learning rates at optimizer step `step`, from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        assert self.total_steps is not None
        return max(0.0, (self.total_steps - step) / (self.total_steps - self.warmup_steps))
