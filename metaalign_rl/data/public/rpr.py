"""RPR (https://huggingface.co/datasets/microsoft/rpr): two criteria that prefer opposite answers.

In a published row `response_a` is better under `criteria_x`, and `response_b` under `criteria_y`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from metaalign_rl.core.dataflow import Row
from metaalign_rl.data.public.load import Record
from metaalign_rl.data.public.rows import Wish, ask, flaw, opposed

COLUMNS = ("prompt", "response_a", "response_b", "criteria_x", "criteria_y", "category_x", "category_y")


def read(records: Iterable[Record], left_out: Counter[str]) -> Iterator[Row]:
    """Six rows for each published row, see `opposed`. Published rows that make no pair are counted in `left_out`."""
    for record in records:
        messages = ask(record.text("prompt"))
        a, b = (record.text(f"response_{name}", may_be_empty=True) for name in "ab")
        if reason := flaw(messages, (a, b)):
            left_out[reason] += 1
            continue
        x = Wish(record.text("criteria_x"), record.text("category_x"), chosen=a, rejected=b)
        y = Wish(record.text("criteria_y"), record.text("category_y"), chosen=b, rejected=a)
        yield from opposed(f"rpr-{record.id}", "helpful", messages, x, y)
