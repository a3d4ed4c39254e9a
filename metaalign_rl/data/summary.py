"""A data file for people: counts of its rows, whether they are valid, and the rows in readable form."""

import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from metaalign_rl.core.dataflow import ANSWERS, FAMILIES, RELATIONS, TIERS, Row
from metaalign_rl.core.errors import BadRows
from metaalign_rl.core.meta_prompt import MARKERS
from metaalign_rl.core.rows import read_checked_rows, read_rows
from metaalign_rl.data.row_checks import check_row


def validate(path: Path) -> str:
    """Check every row of a file, its gold checks included; the counts by relation, tier, family and more, as text.

    Raises:
        UserError: rows are wrong; names file, line and field of each, see `BadRows`.
    """
    bad = BadRows()
    rows = read_checked_rows(path, check_row, bad)
    bad.require_none()
    return "\n".join([f"{path}: {len(rows):,} rows", *_counts(rows)])


def show(path: Path, count: int) -> str:
    """The first `count` rows of a file in readable form.

    Raises:
        UserError: one of these rows is wrong.
    """
    return "\n\n".join("\n".join(_lines(row)) for row in islice(read_rows(path), count))


def _counts(rows: list[Row]) -> Iterator[str]:
    tables: dict[str, tuple[Counter[str], tuple[str, ...]]] = {
        "relation": (Counter(row.relation for row in rows), RELATIONS),
        "tier": (Counter(row.tier for row in rows), TIERS),
        "family": (Counter(row.family for row in rows), FAMILIES),
        "split": (Counter(row.tags.get("split", "none") for row in rows), ()),
        "answers": (
            Counter(name for row in rows for name in ANSWERS if getattr(row, name) is not None),
            ANSWERS,
        ),
        "checks": (Counter(str(check["name"]) for row in rows for check in row.checks.values()), ()),
    }
    for name, (counter, order) in tables.items():
        counts = "  ".join(f"{value} {counter[value]:,}" for value in order or sorted(counter) if counter[value])
        yield f"  {name:<9}{counts or 'none'}"


def _lines(row: Row) -> Iterator[str]:
    yield f"{row.id}: {row.relation}, {row.family}, governed by {row.tier}"
    yield from _field(MARKERS["system"], row.system_info)
    yield from _field(MARKERS["user"], row.user_info)
    for message in row.messages:
        yield from _field(message["role"], message["content"])
    for name in ANSWERS:
        yield from _field(name, getattr(row, name) or "")
    for tier, check in row.checks.items():
        arguments = " ".join(f"{key}={value!r}" for key, value in check.items() if key != "name")
        yield from _field(f"check {tier}", f"{check['name']} {arguments}".rstrip())
    yield from _field("tags", " ".join(f"{key}={value}" for key, value in row.tags.items()))


def _field(name: str, text: str) -> Iterator[str]:
    if text:
        yield textwrap.indent(text, " " * 18).replace(" " * 18, f"  {name:<16}", 1)
