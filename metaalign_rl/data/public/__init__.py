"""Public preference data as rows: one adapter per data set, by the value of `data.source`.

Importing this package does not import the `datasets` library.
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.data.public import helpsteer2, hh_rlhf, multifaceted, rpr, safe_rlhf
from metaalign_rl.data.public.load import Record, load

HELD_OUT = 0.1  # share of the prompts, for data sets without a published held-out split


@dataclass(frozen=True, slots=True)
class Adapter:
    """How one data set becomes rows.

    Attributes:
        hub_id: the data set on the Hugging Face hub.
        columns: the columns that `read` needs.
        read: turns published rows into rows, and counts by reason those that it leaves out.
        parts: folders of the data set that are loaded one by one.
    """

    hub_id: str
    columns: tuple[str, ...]
    read: Callable[[Iterable[Record], Counter[str]], Iterator[Row]]
    parts: tuple[str, ...] = ()


ADAPTERS = {
    "rpr": Adapter("microsoft/rpr", rpr.COLUMNS, rpr.read),
    "multifaceted": Adapter("kaist-ai/Multifaceted-Collection-RM", multifaceted.COLUMNS, multifaceted.read),
    "safe_rlhf": Adapter("PKU-Alignment/PKU-SafeRLHF", safe_rlhf.COLUMNS, safe_rlhf.read),
    "hh_rlhf": Adapter("Anthropic/hh-rlhf", hh_rlhf.COLUMNS, hh_rlhf.read, hh_rlhf.PARTS),
    "helpsteer2": Adapter("nvidia/HelpSteer2", helpsteer2.COLUMNS, helpsteer2.read),
}


@dataclass(frozen=True, slots=True)
class PublicPairs:
    """The pairs of a data set. Every published row is in one of the lists or counted in `left_out`.

    Attributes:
        train, held_out: pairs. No prompt, the first message of a dialog, is in both.
        left_out: number of rows by reason, such as "rows with an empty answer".
    """

    train: list[Row]
    held_out: list[Row]
    left_out: Counter[str]


def read_public(source: str, path: str) -> PublicPairs:
    """Read the pairs of the data set `source`. Each row's tag `split` is "train" or "held_out".

    The published splits are kept, except that training pairs with a held-out prompt are left out. Without a published
    held-out split, a tenth of the prompts is held out, by their hashes.

    Args:
        source: a key of `ADAPTERS`.
        path: a hub id, a folder or a file.

    Raises:
        UserError: see `load`; or a published row has a wrong value, or there is no pair to train on.
    """
    adapter = ADAPTERS[source]
    if not path:
        raise UserError(f"data.path: expected a hub id such as {adapter.hub_id}, or a folder or file, found nothing")
    left_out: Counter[str] = Counter()
    train: list[Row] = []
    held_out: list[Row] = []
    for table in load(path, adapter.columns, adapter.parts):
        (held_out if table.is_held_out else train).extend(adapter.read(table.records(), left_out))
    train, held_out = _split(train, held_out, left_out)
    if not train:
        found = ", ".join(f"{count:,} {what}" for what, count in (+left_out).items()) or "no rows"
        raise UserError(f"{path}: expected pairs to train on, found {found}; check data.source and data.path")
    for split, rows in (("train", train), ("held_out", held_out)):
        for row in rows:
            row.tags["split"] = split
    return PublicPairs(train, held_out, +left_out)


def take(rows: Sequence[Row], limit: int, seed: int) -> list[Row]:
    """At most `limit` rows, in an order that depends only on the seed. Rows of the same prompt are adjacent."""
    return heapq.nsmallest(limit, rows, key=lambda row: _digest(f"{seed} {_prompt(row)}"))


def prompts(pairs: Iterable[Row], limit: int) -> list[Row]:
    """At most `limit` rows without answers, one for each distinct pair of meta-prompt and dialog."""
    found: dict[str, Row] = {}
    for row in pairs:
        tags = {name: tag for name, tag in row.tags.items() if not name.startswith("flip")}
        key = json.dumps([row.system_info, row.user_info, row.messages])
        found.setdefault(key, replace(row, chosen=None, rejected=None, tags=tags))
    return list(found.values())[:limit]


def _split(train: list[Row], held_out: list[Row], left_out: Counter[str]) -> tuple[list[Row], list[Row]]:
    if not held_out:
        return [row for row in train if not _is_held_out(row)], [row for row in train if _is_held_out(row)]
    known = {_prompt(row) for row in held_out}
    fresh = [row for row in train if _prompt(row) not in known]
    left_out["training pairs whose prompt is held out"] = len(train) - len(fresh)
    return fresh, held_out


def _prompt(row: Row) -> str:
    return row.messages[0]["content"]


def _is_held_out(row: Row) -> bool:
    return int.from_bytes(_digest(_prompt(row))) < HELD_OUT * 2**256


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
