"""The rollouts for a page's browser: a sample in the page itself, and all of them in scripts that it can load.

Scripts and not JSON, since a page that was opened as a file may load those alone.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.dataflow import LABELS, TIERS
from metaalign_rl.core.files import replace_folder
from metaalign_rl.core.units import MIB

SHOWN, SHOWN_BYTES = 4_000, 4 * MIB  # at most, of answers in the page itself
BESIDE, BESIDE_BYTES = 100_000, 128 * MIB  # at most, of answers in the scripts, which a browser holds in memory
PART = 4_000  # answers a script
GOOD = 0.5  # the proxy from which on the reward model calls an answer good


@dataclass
class Answers:
    """Answers as the page's script reads them: `rows` says what was asked, `samples` are the answers, each with the
    index of its row."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def add(self, record: dict[str, Any]) -> None:
        """Take in a line of the kept rollouts."""
        if record["row"] not in self._places:
            self._places[record["row"]] = len(self.rows)
            self.rows.append(_row(record))
        self.samples.append(_sample(record, self._places[record["row"]]))

    def as_json(self) -> dict[str, Any]:
        """Both, for JSON."""
        return {"rows": self.rows, "samples": self.samples}


def write_browser(folder: RunFolder, seed: int = 0) -> dict[str, Any] | None:
    """What the page's browser of rollouts reads; None where the run kept none.

    Where the page holds a sample only, the answers are written to `rollouts_page/` beside it: all of them, or as many
    as a browser can hold.

    Returns: `total`, the number of answers kept; `rows` and `samples` as in `Answers`; `parts`, the number of scripts
        beside the page; and `beside`, the number of answers in them.
    """
    if not folder.rollouts.is_dir():
        return None
    from metaalign_rl.monitoring.rollout_table import count_rollouts

    total, size = count_rollouts(folder.rollouts)
    if not total:
        return None
    draw = random.Random(seed)
    shown = set(draw.sample(range(total), min(total, SHOWN, 1 + SHOWN_BYTES * total // size)))
    beside = set(draw.sample(range(total), min(total, BESIDE, 1 + BESIDE_BYTES * total // size)))
    if len(shown) == total:
        beside = set()
    page, parts = Answers(), -(-len(beside) // PART)
    replace_folder(folder.rollouts_page, lambda path: _write_parts(folder.rollouts, path, page, shown, beside))
    if not parts:
        folder.rollouts_page.rmdir()
    return {"total": total, **page.as_json(), "parts": parts, "beside": len(beside)}


def _write_parts(rollouts: Path, folder: Path, page: Answers, shown: set[int], beside: set[int]) -> None:
    """Fill the page's answers and write the scripts, in one pass over the files."""
    from metaalign_rl.monitoring.rollout_table import read_chosen

    part, number = Answers(), 0
    for place, record in read_chosen(rollouts, shown | beside):
        if place in shown:
            page.add(record)
        if place in beside:
            part.add(record)
        if len(part.samples) == PART:
            _write_part(folder, number, part)
            part, number = Answers(), number + 1
    if part.samples:
        _write_part(folder, number, part)


def _write_part(folder: Path, number: int, part: Answers) -> None:
    text = json.dumps(part.as_json(), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    (folder / f"part-{number}.js").write_text(f"addRollouts({text});\n", encoding="utf-8")


def _row(record: dict[str, Any]) -> dict[str, Any]:
    names = ("row", "tier", "relation", "kind", "system_info", "user_info")
    return {name: record[name] for name in names} | {"messages": json.loads(record["messages"])}


def _sample(record: dict[str, Any], row: int) -> dict[str, Any]:
    def rounded(name: str) -> float | None:
        return None if record[name] is None else round(record[name], 3)

    return {
        "step": record["step"],
        "row": row,
        "answer": record["answer"],
        "tokens": record["tokens"],
        "finished": record["finished"],
        "reward": rounded("reward"),
        "proxy": rounded("proxy"),
        "gold": record["gold"],
        "agrees": None if None in (record["gold"], record["proxy"]) else record["gold"] == (record["proxy"] >= GOOD),
        "p": {label: rounded(f"p_{label}") for label in LABELS if record[f"p_{label}"] is not None},
        "passes": {tier: record[f"passes_{tier}"] for tier in TIERS if record[f"passes_{tier}"] is not None},
    }
