"""Views of a row: a model sees the full row, or less of it (ablations and controls)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, get_args

from metaalign_rl.core.dataflow import Row

Control = Literal["preference_blind", "tier_blind", "scalar"]
CONTROLS: tuple[Control, ...] = get_args(Control)
View = Literal["whole", "preference_blind", "tier_blind"]


def apply_view(rows: Sequence[Row], view: View) -> list[Row]:
    """The rows as a model with this view sees them."""
    views: dict[View, Callable[[Sequence[Row]], list[Row]]] = {
        "whole": list,
        "preference_blind": preference_blind,
        "tier_blind": tier_blind,
    }
    return views[view](rows)


def active_tiers(row: Row) -> list[str]:
    """The tiers above the dialog whose text is not empty, highest priority first."""
    texts = {"system": row.system_info, "user": row.user_info}
    return [tier for tier, text in texts.items() if text.strip()]


def preference_blind(rows: Iterable[Row]) -> list[Row]:
    """The rows without their meta-prompts."""
    return [_view(row, "") for row in rows]


def tier_blind(rows: Iterable[Row]) -> list[Row]:
    """The rows with both tiers' texts, sorted, in System Info. They hide which tier a text is from."""
    texts = {"system": "system_info", "user": "user_info"}
    return [_view(row, "\n".join(sorted(getattr(row, texts[tier]) for tier in active_tiers(row)))) for row in rows]


def _view(row: Row, system_info: str) -> Row:
    labels = {
        answer: {label: value for label, value in values.items() if label in ("dialog", "overall")}
        for answer, values in row.labels.items()
    }
    return replace(row, tier="dialog", system_info=system_info, user_info="", labels=labels)
