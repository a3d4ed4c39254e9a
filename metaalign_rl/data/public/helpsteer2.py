"""HelpSteer2 (https://huggingface.co/datasets/nvidia/HelpSteer2): answers with five ratings from 0 to 4.

The two answers to a prompt are consecutive published rows. In a dialog of several messages, lines such as
"<extra_id_1>Assistant" name the speaker.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby

from metaalign_rl.core.dataflow import Row
from metaalign_rl.data.public.load import Record
from metaalign_rl.data.public.rows import Messages, Wish, alone, flaw, opposed, split_turns

# By attribute: a tier's text that asks for more of it, and one that asks for less where that makes sense.
WISHES: dict[str, tuple[str, str | None]] = {
    "helpfulness": ("Be as helpful as you can: do what was asked for, all of it.", None),
    "correctness": ("Get every fact right and leave no important one out.", None),
    "coherence": ("Be clear, and consistent from beginning to end.", None),
    "complexity": ("Answer for an expert, in depth.", "Answer in plain words that anyone understands."),
    "verbosity": ("Answer at length and in detail.", "Answer briefly."),
}
COLUMNS = ("prompt", "response", *WISHES)
BEST = 4

_TURN = re.compile(r"^<extra_id_1>(User|Assistant)\n", re.MULTILINE)


def read(records: Iterable[Record], left_out: Counter[str]) -> Iterator[Row]:
    """Rows for each attribute in which two answers differ: two, or six if there is a text that asks for less.

    The two rows ask for more of the attribute, one in each tier. For the six rows, see `opposed`. Published rows that
    make no pair are counted in `left_out`.
    """
    for prompt, same in groupby(records, key=lambda record: record.text("prompt")):
        group, messages = list(same), split_turns(prompt, _TURN)
        if len(group) % 2:
            left_out["rows without a second answer to their prompt"] += 1
        for pair in zip(group[::2], group[1::2], strict=False):
            reason = flaw(messages, [record.text("response", may_be_empty=True) for record in pair])
            rows = [] if reason else list(_rows(messages, *pair))
            if not rows:
                left_out[reason or "rows whose two answers have equal ratings"] += 2
            yield from rows


def _rows(messages: Messages, one: Record, other: Record) -> Iterator[Row]:
    for attribute, (more, less) in WISHES.items():
        ratings = [record.number(attribute, BEST) for record in (one, other)]
        if ratings[0] == ratings[1]:
            continue
        high, low = (record.text("response") for record in ((one, other) if ratings[0] > ratings[1] else (other, one)))
        identity = f"helpsteer2-{one.id}-{attribute}"
        strength = abs(ratings[0] - ratings[1]) / BEST
        wish = Wish(more, attribute, chosen=high, rejected=low, strength=strength)
        if less is not None:
            other_wish = Wish(less, attribute, chosen=low, rejected=high, strength=strength)
            yield from opposed(identity, "helpful", messages, wish, other_wish)
        else:
            yield alone(f"{identity}-system", "helpful", messages, wish, "system")
            yield alone(f"{identity}-user", "helpful", messages, wish, "user")
