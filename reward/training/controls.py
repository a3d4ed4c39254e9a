"""The controls: reward models that lack one thing, trained on the same rows, which show what that thing is worth.

`preference_blind` sees no meta-prompt. `tier_blind` sees both tiers' texts, but not which tier said what. `scalar` sees
the whole, and is trained on the label `overall` alone, as other libraries' reward models are.

A blind control is trained and evaluated on its view of the rows. A view's rows are governed by the dialog, and carry
no tier's labels, so that which tier governs cannot reach the control by way of the label it is trained on or read at.
Every control is read in mode `overall`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, get_args

from metaalign_rl.core.rows import Row
from reward.training.config import RewardTraining
from reward.score import MODES, Mode, speaking_tiers

Control = Literal["preference_blind", "tier_blind", "scalar"]
CONTROLS: tuple[Control, ...] = get_args(Control)
View = Literal["whole", "preference_blind", "tier_blind"]  # what of a row a model sees


def see(rows: Sequence[Row], view: View) -> list[Row]:
    """The rows as a model of this view sees them."""
    views: dict[View, Callable[[Sequence[Row]], list[Row]]] = {
        "whole": list,
        "preference_blind": preference_blind,
        "tier_blind": tier_blind,
    }
    return views[view](rows)


def view_of(name: str) -> View:
    """What a model sees: a blind control its own view, every other model the whole row."""
    return name if name in ("preference_blind", "tier_blind") else "whole"  # type: ignore[return-value]


def modes_of(name: str) -> tuple[Mode, ...]:
    """The modes in which a model is read: a control's tiers' scores say nothing."""
    return ("overall",) if name in CONTROLS else MODES


def training_of(name: str, training: RewardTraining) -> RewardTraining:
    """How a model is trained where its siblings are trained so."""
    return replace(training, labels="overall") if name == "scalar" else training


def preference_blind(rows: Iterable[Row]) -> list[Row]:
    """The rows without their meta-prompts."""
    return [_view(row, "") for row in rows]


def tier_blind(rows: Iterable[Row]) -> list[Row]:
    """The rows with both tiers' texts, sorted, as one System Info: which tier said what is hidden."""
    texts = {"system": "system_info", "user": "user_info"}
    return [_view(row, "\n".join(sorted(getattr(row, texts[tier]) for tier in speaking_tiers(row)))) for row in rows]


def _view(row: Row, system_info: str) -> Row:
    labels = {
        answer: {label: value for label, value in values.items() if label in ("dialog", "overall")}
        for answer, values in row.labels.items()
    }
    return replace(row, tier="dialog", system_info=system_info, user_info="", labels=labels)
