"""What becomes of a policy's answers when its meta-prompt is taken away, turned round or said in other words."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from metaalign_rl.core.dataflow import Row
from metaalign_rl.data.flips import can_flip, swap


@dataclass(frozen=True, slots=True)
class Change:
    """One way to change the rows.

    Attributes:
        meaning: what is changed and by what the answers are judged.
        shown: what the policy is asked. judged: the row whose checks judge its answer.
    """

    meaning: str
    shown: Callable[[Row], Row]
    judged: Callable[[Row], Row]


def changes(source: str) -> dict[str, Change]:
    """The changes that suit a data source, by name."""
    found = {
        "as_is": Change("as they are", as_it_is, as_it_is),
        "removed": Change("meta-prompt removed, judged as if it were there", remove, as_it_is),
        "swapped": Change("the tiers' texts in each other's place, judged by their new order", swap, swap),
        "swapped_old_order": Change("the same answers, judged by the old order", swap, as_it_is),
    }
    if source == "world":
        from metaalign_rl.data.world.renaming import rename

        found["renamed"] = Change("preferences in invented words, judged as if they were known", rename, as_it_is)
    return found


def remove(row: Row) -> Row:
    """The row without its meta-prompt."""
    return replace(row, system_info="", user_info="")


def as_it_is(row: Row) -> Row:
    """The row."""
    return row


def changeable(rows: Sequence[Row], count: int, seed: int = 0) -> list[Row]:
    """At most `count` of the rows that every change suits, drawn by chance and in their order."""
    rows = [row for row in rows if can_flip(row) or (row.relation != "conflict" and swap(row).tier in swap(row).checks)]
    chosen = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in sorted(chosen)]
