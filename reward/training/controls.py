"""The controls: reward models that lack one thing and are trained on the same rows. They show what that thing adds.

- `preference_blind` does not see the meta-prompt.
- `tier_blind` sees the texts of both tiers, but not which tier each text belongs to.
- `scalar` sees the full row and is trained on the label `overall` alone, like the reward models of other libraries.

A blind control is trained and evaluated on its view of the rows. In such a view the dialog governs every row, and rows
have no labels of tiers. Otherwise the label that is trained or read would reveal which tier governs. All controls are
read in mode `overall`.
"""

from dataclasses import replace

from metaalign_rl.core.views import CONTROLS, View
from reward.score import MODES, Mode
from reward.training.config import RewardTraining


def view_of(name: str) -> View:
    """The view of the rows that a model sees: the control's own if it is blind, else the complete row."""
    return name if name in ("preference_blind", "tier_blind") else "whole"  # type: ignore[return-value]


def modes_of(name: str) -> tuple[Mode, ...]:
    """The modes in which a model is read. A control's tier scores have no meaning, so it has `overall` only."""
    return ("overall",) if name in CONTROLS else MODES


def training_of(name: str, training: RewardTraining) -> RewardTraining:
    """The settings with which a model is trained, given those of the reward model."""
    return replace(training, labels="overall") if name == "scalar" else training
