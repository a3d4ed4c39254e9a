"""What a reward model's config says of its training, under the key `metaalign`."""

from dataclasses import dataclass
from typing import Any

from metaalign_rl.core.dataflow import LABELS


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """What a model was trained on.

    Attributes:
        max_tokens: of the longest text in training; None if the checkpoint does not say.
        trained: the labels that had training data.
        calibrated: the labels whose temperature was fitted on held-out rows. The others have temperature 1.
    """

    max_tokens: int | None = None
    trained: tuple[str, ...] = LABELS
    calibrated: tuple[str, ...] = LABELS

    @classmethod
    def of(cls, config: Any) -> "CheckpointRecord":
        """The record in a transformers config. A checkpoint without one counts as trained on all labels."""
        found = getattr(config, "metaalign", None) or {}
        trained, calibrated = (tuple(found.get(f"{name}_labels", LABELS)) for name in ("trained", "calibrated"))
        return cls(found.get("max_tokens"), trained, calibrated)

    @property
    def untrained(self) -> frozenset[str]:
        """The labels without training data."""
        return frozenset(LABELS) - frozenset(self.trained)

    def write(self, config: Any) -> None:
        """Store the record in a transformers config, which is saved with the model."""
        labels = {"trained_labels": list(self.trained), "calibrated_labels": list(self.calibrated)}
        config.metaalign = {**config.metaalign, "max_tokens": self.max_tokens, **labels}
