"""The controls: reward models that lack one thing, trained on the same rows, which show what that thing is worth.

`preference_blind` sees no meta-prompt. `tier_blind` sees both tiers' texts, but not which tier said what. `scalar` sees
the whole, and is trained on the label `overall` alone, as other libraries' reward models are.

A blind control is trained and evaluated on its view of the rows. A view's rows are governed by the dialog, and carry
no tier's labels, so that which tier governs cannot reach the control by way of the label it is trained on or read at.
Every control is read in mode `overall`.
"""

from dataclasses import replace

from metaalign_rl.core.views import CONTROLS, View
from reward.score import MODES, Mode
from reward.training.config import RewardTraining


def view_of(name: str) -> View:
    """What a model sees: a blind control its own view, every other model the whole row."""
    return name if name in ("preference_blind", "tier_blind") else "whole"  # type: ignore[return-value]


def modes_of(name: str) -> tuple[Mode, ...]:
    """The modes in which a model is read: a control's tiers' scores say nothing."""
    return ("overall",) if name in CONTROLS else MODES


def training_of(name: str, training: RewardTraining) -> RewardTraining:
    """How a model is trained where its siblings are trained so."""
    return replace(training, labels="overall") if name == "scalar" else training
