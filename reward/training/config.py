"""Settings of the reward model's training. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from metaalign_rl.core.dataflow import LABELS
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.settings import (
    PLAIN,
    require,
    require_at_least,
    require_options,
    require_positive,
    setting,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonTraining:
    """The settings that `RewardTraining` and the `reward` section of a run have in common.

    A run's defaults suit a new small model; `metaalign_rl.config.reward.RewardConfig` lists those that differ.
    """

    learning_rate: float = setting(
        1e-5,
        "Peak learning rate. Use about 1e-5 for models with billions of parameters, about 1e-3 for a model with a "
        "million.",
        unit=PLAIN,
        level="core",
    )
    batch_size: int = setting(64, "Rows (pairs or labelled responses) per update, over all devices.", unit="rows")
    gradient_accumulation: int = setting(
        1, "Passes over which the rows of an update are spread, to save memory.", unit="passes"
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    epochs: float = setting(
        1.0, "Passes over the rows (in a run, the pairs and the SFT policy's responses).", unit="passes"
    )
    margin: float = setting(
        0.0,
        "Gap below which a pair's loss stays large. It is multiplied by the pair's strength if the row states one.",
        unit="logits",
    )
    label_smoothing: float = setting(
        0.0, "Share of the pairs and labels that are assumed to be wrong, below 0.5.", unit="share"
    )
    lora_rank: int = setting(
        0,
        "Train adapters of this rank in the backbone's linear layers, and the head. 0 trains all weights.",
        unit=PLAIN,
    )
    lora_alpha: float = setting(32.0, "The output of an adapter is scaled by lora_alpha / lora_rank.", unit=PLAIN)
    token_weight: float = setting(
        0.0,
        "Weight of the cross-entropy at each token after a pair's responses diverge, in addition to the loss at the "
        "last token. Only decoders have a score at each token.",
        unit="weight",
    )
    easy_first_fraction: float = setting(
        0.0,
        "Share of the rows that come first in training. They are pairs of a right and a wrong response, which are "
        "learned slowly when they are mixed with the other rows.",
        unit="share",
    )

    def _check_common(self, prefix: str) -> None:
        """Check the values; `prefix` comes before a field's name in errors."""
        require_positive(self, prefix, ("learning_rate", "epochs", "lora_alpha"))
        require_at_least(self, prefix, 1, ("batch_size", "gradient_accumulation"))
        least_zero = ("margin", "label_smoothing", "lora_rank", "token_weight", "easy_first_fraction")
        require_at_least(self, prefix, 0, least_zero)
        require(f"{prefix}label_smoothing", self.label_smoothing < 0.5, "a share below 0.5", self.label_smoothing)
        passes = self.gradient_accumulation
        is_spread = self.batch_size % passes == 0
        require(f"{prefix}batch_size", is_spread, f"a multiple of gradient_accumulation={passes}", self.batch_size)
        first = self.easy_first_fraction
        require(f"{prefix}easy_first_fraction", first < 1, "a share below 1", first)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTraining(CommonTraining):
    """How the reward model is trained."""

    warmup_ratio: float = setting(0.05, "Share of the updates in which the learning rate rises.", unit="share")
    schedule: Literal["cosine", "linear"] = setting("cosine", "How the learning rate falls after the warm-up.")
    weight_decay: float = setting(0.0, "AdamW's weight decay.", unit=PLAIN)
    bt_weight: float = setting(1.0, "Weight of the Bradley-Terry loss on pairs.", unit="weight")
    bce_weight: float = setting(1.0, "Weight of the binary cross-entropy on absolute labels.", unit="weight")
    labels: Literal["all", "overall"] = setting(
        "all",
        "Labels to train. With `overall` alone, the model is the control scalar: a reward model as in other libraries.",
    )
    max_tokens: int = setting(
        1024, "Tokens per text. A longer dialog is truncated on the left. A tier is never truncated.", unit="tokens"
    )
    calibration_share: float = setting(
        0.05,
        "Share of the labelled rows that is held back from training, with their whole prompts, to fit the temperatures "
        "of the calibration.",
        unit="share",
    )
    checkpoint_steps: int = setting(500, "Updates between two checkpoints to resume from.", unit="optimizer steps")
    log_steps: int = setting(10, "Updates between two lines of the log.", unit="optimizer steps")
    bf16: bool = setting(False, "Compute in bfloat16, with the weights in float32.")
    seed: int = setting(0, "Seed of the new head, the held-out rows and the order of the rows.", unit=PLAIN)

    def __post_init__(self) -> None:
        self._check_common("")
        require_options(self, "")
        require_at_least(self, "", 1, ("max_tokens", "checkpoint_steps", "log_steps"))
        require_at_least(
            self, "", 0, ("warmup_ratio", "weight_decay", "bt_weight", "bce_weight", "calibration_share", "seed")
        )
        for name in ("warmup_ratio", "calibration_share"):
            share = getattr(self, name)
            require(name, share < 1, "a share below 1", share)
        if self.bt_weight == 0 and self.bce_weight == 0:
            raise UserError("bt_weight and bce_weight: both are 0, so nothing is trained; raise one of them")

    @property
    def trained_labels(self) -> tuple[str, ...]:
        """The labels that get a loss, a gradient and a temperature.

        With `overall` alone, the model is as good as one with a single output: the outputs are rows of one linear
        layer, and a row without a loss gets no gradient and passes none to the layers below.
        """
        return LABELS if self.labels == "all" else ("overall",)
