"""Settings of the reward model's training. No torch here."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from metaalign_rl.core.dataflow import LABELS
from metaalign_rl.core.errors import UserError

_NOT_NEGATIVE = (
    "warmup_ratio",
    "weight_decay",
    "bt_weight",
    "bce_weight",
    "margin",
    "label_smoothing",
    "token_weight",
    "right_first",
    "lora_rank",
    "calibration_share",
    "seed",
)


def _setting(default: Any, help: str) -> Any:
    """A field with its meaning, which the command line shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTraining:
    """How the reward model is trained."""

    learning_rate: float = _setting(1e-5, "peak learning rate; about 1e-3 for a model of a million parameters")
    batch_size: int = _setting(64, "rows (pairs or labelled answers) an update")
    gradient_accumulation: int = _setting(1, "passes that an update's rows are spread over, to save memory")
    epochs: float = _setting(1.0, "passes over the rows")
    warmup_ratio: float = _setting(0.05, "share of the updates in which the learning rate rises")
    schedule: Literal["cosine", "linear"] = _setting("cosine", "how the learning rate falls after that")
    weight_decay: float = _setting(0.0, "AdamW's")
    bt_weight: float = _setting(1.0, "weight of the Bradley-Terry loss on pairs")
    bce_weight: float = _setting(1.0, "weight of the binary cross-entropy on absolute labels")
    margin: float = _setting(
        0.0, "gap, in logits, below which a pair's loss stays large; times the pair's strength where a row states one"
    )
    label_smoothing: float = _setting(0.0, "share of the pairs and labels that are taken to be wrong, below a half")
    token_weight: float = _setting(
        0.0,
        "weight of the cross-entropy at each token from where a pair's answers part, not only the last; decoders only",
    )
    right_first: float = _setting(
        0.0,
        "share of the rows that come first: pairs of a right and a wrong answer, which is slow to learn among others",
    )
    labels: Literal["all", "overall"] = _setting(
        "all", "which labels to train; overall alone makes the control scalar, a reward model as other libraries train"
    )
    lora_rank: int = _setting(
        0, "train adapters of this rank in the backbone's linear layers, and the head; 0: all weights"
    )
    lora_alpha: float = _setting(32.0, "an adapter's product counts lora_alpha / lora_rank times")
    max_tokens: int = _setting(1024, "tokens a text; a longer dialog loses its left end, a tier never")
    calibration_share: float = _setting(0.05, "share of the labelled rows kept from training to fit the temperatures")
    checkpoint_steps: int = _setting(500, "updates between two checkpoints to resume from")
    log_steps: int = _setting(10, "updates between two lines of the log")
    bf16: bool = _setting(False, "compute in bfloat16, with weights in float32 (a GPU)")
    gradient_checkpointing: bool = _setting(False, "recompute activations to save memory")
    seed: int = _setting(0, "of the new head, the held-out rows and the order")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is bool or isinstance(value, str):
                continue
            if value < 0 or (value == 0 and f.name not in _NOT_NEGATIVE):
                least = "0 or more" if f.name in _NOT_NEGATIVE else "more than 0"
                raise UserError(f"{f.name}: expected {least}, found {value}")
        for name in ("warmup_ratio", "right_first", "calibration_share"):
            if getattr(self, name) >= 1:
                raise UserError(f"{name}: expected a share below 1, found {getattr(self, name)}")
        if self.label_smoothing >= 0.5:
            raise UserError(f"label_smoothing: expected a share below 0.5, found {self.label_smoothing}")
        if self.schedule not in ("cosine", "linear"):
            raise UserError(f"schedule: expected cosine or linear, found {self.schedule!r}")
        if self.labels not in ("all", "overall"):
            raise UserError(f"labels: expected all or overall, found {self.labels!r}")
        if self.batch_size % self.gradient_accumulation:
            raise UserError(
                f"batch_size: {self.batch_size} rows do not divide into {self.gradient_accumulation} passes; "
                "choose a multiple of gradient_accumulation"
            )
        if self.bt_weight == 0 and self.bce_weight == 0:
            raise UserError("bt_weight and bce_weight: both are 0, which leaves nothing to train; raise one")

    @property
    def trained_labels(self) -> tuple[str, ...]:
        """The labels that get a loss, a gradient and a temperature.

        With `overall` alone that is as good as a head with one output: the labels' outputs are rows of one linear
        layer, and where nothing is asked of a row, no gradient of its own reaches it or the layers below.
        """
        return LABELS if self.labels == "all" else ("overall",)
