"""The two controls' views of pairs: what a reward model learns that cannot see the preferences, or their
tiers.

Train and evaluate on the same view, evaluating in mode `overall`. A view's rows are governed by the dialog,
and carry no tier's labels, so that which tier governs cannot reach the control by way of the label it is
trained on or read at.
"""

from collections.abc import Iterable
from dataclasses import replace

from metaalign_rl.schema import Row
from reward.score import speaking_tiers


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
