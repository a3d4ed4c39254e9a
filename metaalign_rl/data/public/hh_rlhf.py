"""HH-RLHF (https://huggingface.co/datasets/Anthropic/hh-rlhf): transcripts, by objective in a folder each.

A published row has two transcripts, `chosen` and `rejected`, that part with the assistant's last message.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from metaalign_rl.core.dataflow import Row
from metaalign_rl.data.public.load import Record
from metaalign_rl.data.public.rows import HARMLESS, HELPFUL, Messages, Wish, alone, flaw, split_turns

COLUMNS = ("chosen", "rejected")
OBJECTIVES = {"helpful-base": ("helpful", HELPFUL, "helpful"), "harmless-base": ("harmless", HARMLESS, "priority")}
PARTS = tuple(OBJECTIVES)

_TURN = re.compile(r"\n\n(Human|Assistant):")


def read(records: Iterable[Record], left_out: Counter[str]) -> Iterator[Row]:
    """Two rows of each published one: its part's objective in the system, and in the user's tier.

    Rows that make no pair are counted in `left_out`.
    """
    for record in records:
        transcripts = [parse(record.text(field)) for field in COLUMNS]
        (*dialog, chosen), (*other, rejected) = transcripts
        if chosen["role"] != "assistant" or rejected["role"] != "assistant":
            reason: str | None = "rows with a transcript that does not end with the assistant"
        elif dialog != other:
            reason = "rows whose transcripts part before the last answer"
        else:
            reason = flaw(dialog, (chosen["content"], rejected["content"]))
        if reason:
            left_out[reason] += 1
            continue
        kind, text, family = OBJECTIVES[record.part]
        wish = Wish(text, kind, chosen["content"], rejected["content"])
        yield alone(f"hh-{record.id}-system", family, dialog, wish, "system")
        yield alone(f"hh-{record.id}-user", family, dialog, wish, "user")


def parse(transcript: str) -> Messages:
    """The messages of a transcript.

    A turn begins with "Human:" or "Assistant:" behind an empty line. The same words elsewhere are text.
    """
    return split_turns("\n\n" + transcript.lstrip("\n"), _TURN)
