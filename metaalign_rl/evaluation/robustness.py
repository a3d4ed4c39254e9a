"""Robustness: rows whose meta-prompt is removed, swapped between the tiers, or written in invented words."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from metaalign_rl.core.dataflow import Row
from metaalign_rl.data.flips import can_flip, swap


@dataclass(frozen=True, slots=True)
class Change:
    """One way to change the rows.

    Attributes:
        meaning: what changes, and how the responses are judged.
        shown: maps a row to the row that the policy gets.
        judged: maps a row to the row whose checks judge the response.
    """

    meaning: str
    shown: Callable[[Row], Row]
    judged: Callable[[Row], Row]


def changes(source: str) -> dict[str, Change]:
    """The changes by name. `source` is `data.source`; only the built-in world has `renamed`."""
    found = {
        "as_is": Change("unchanged", unchanged, unchanged),
        "removed": Change("meta-prompt removed, judged as if it were there", remove, unchanged),
        "swapped": Change("texts of the tiers swapped, judged by the new order", swap, swap),
        "swapped_old_order": Change("the same responses, judged by the old order", swap, unchanged),
    }
    if source == "world":
        from metaalign_rl.data.world.renaming import rename

        found["renamed"] = Change("preferences in invented words, judged as if they were known", rename, unchanged)
    return found


def remove(row: Row) -> Row:
    """The row without its meta-prompt."""
    return replace(row, system_info="", user_info="")


def unchanged(row: Row) -> Row:
    """The row itself."""
    return row


def changeable(rows: Sequence[Row], count: int, seed: int = 0) -> list[Row]:
    """Up to `count` random rows to which every change applies, in their order.

    A conflict needs checks of both tiers and must not be about refusing: there the dialog's check depends on which tier
    wins. Any other row needs a check of the tier that governs it after the swap.
    """
    rows = [row for row in rows if can_flip(row) or (row.relation != "conflict" and swap(row).tier in swap(row).checks)]
    chosen = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in sorted(chosen)]
