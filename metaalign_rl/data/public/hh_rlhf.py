"""HH-RLHF (https://huggingface.co/datasets/Anthropic/hh-rlhf): pairs of transcripts, one folder per objective.

A published row has two transcripts, `chosen` and `rejected`, that differ in the assistant's last message.
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
    """Two rows for each published row: the objective of its folder in the system tier, and in the user tier.

    Published rows that make no pair are counted in `left_out`.
    """
    for record in records:
        transcripts = [parse(record.text(field)) for field in COLUMNS]
        (*dialog, chosen), (*other, rejected) = transcripts
        if chosen["role"] != "assistant" or rejected["role"] != "assistant":
            reason: str | None = "rows with a transcript that does not end with the assistant"
        elif dialog != other:
            reason = "rows whose transcripts differ before the last answer"
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

    A turn begins with "Human:" or "Assistant:" after an empty line. Elsewhere these words are ordinary text.
    """
    return split_turns("\n\n" + transcript.lstrip("\n"), _TURN)
