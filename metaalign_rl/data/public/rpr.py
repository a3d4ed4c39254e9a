"""RPR (https://huggingface.co/datasets/microsoft/rpr): criteria that reverse which of two answers is preferred.

Under `criteria_x` the published row's `response_a` is the better one, under `criteria_y` its `response_b`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from metaalign_rl.core.dataflow import Row
from metaalign_rl.data.public.load import Record
from metaalign_rl.data.public.rows import Wish, ask, flaw, opposed

COLUMNS = ("prompt", "response_a", "response_b", "criteria_x", "criteria_y", "category_x", "category_y")


def read(records: Iterable[Record], left_out: Counter[str]) -> Iterator[Row]:
    """Six rows of each published one, see `opposed`; rows that make no pair are counted in `left_out`."""
    for record in records:
        messages = ask(record.text("prompt"))
        a, b = (record.text(f"response_{name}", may_be_empty=True) for name in "ab")
        if reason := flaw(messages, (a, b)):
            left_out[reason] += 1
            continue
        x = Wish(record.text("criteria_x"), record.text("category_x"), chosen=a, rejected=b)
        y = Wish(record.text("criteria_y"), record.text("category_y"), chosen=b, rejected=a)
        yield from opposed(f"rpr-{record.id}", "helpful", messages, x, y)
