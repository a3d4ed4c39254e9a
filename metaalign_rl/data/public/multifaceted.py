"""Multifaceted Collection (https://huggingface.co/datasets/kaist-ai/Multifaceted-Collection-RM): a persona's wishes.

The `input` of a published row is a system message, a line break and an instruction. `chosen` was written for this
system message, `rejected` for another one.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from metaalign_rl.core.dataflow import Row
from metaalign_rl.data.public.load import Record
from metaalign_rl.data.public.rows import Wish, alone, ask, flaw

COLUMNS = ("input", "chosen", "rejected")


def read(records: Iterable[Record], left_out: Counter[str]) -> Iterator[Row]:
    """One row for each published row. Published rows that make no pair are counted in `left_out`.

    Only a line break separates the system message from the instruction, which often has several lines. So the text
    before the first line break is read as the system message.
    """
    for record in records:
        system, _, instruction = record.text("input").strip().partition("\n")
        chosen, rejected = (record.text(field, may_be_empty=True) for field in ("chosen", "rejected"))
        messages = ask(instruction)
        reason = flaw(messages, (chosen, rejected)) if instruction else "rows whose input is one line"
        if reason:
            left_out[reason] += 1
            continue
        wish = Wish(system.strip(), "persona", chosen, rejected)
        yield alone(f"multifaceted-{record.id}", "diverse_opinion", messages, wish, "system")
