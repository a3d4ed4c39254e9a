"""The rollout browser's data: a sample of the responses in the page, and all of them in scripts that it can load.

They are scripts because a page that is opened as a file cannot load JSON.
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
from reward.score import GOOD

IN_PAGE, IN_PAGE_BYTES = 4_000, 4 * MIB  # most responses in the page
IN_SCRIPTS, IN_SCRIPTS_BYTES = 100_000, 128 * MIB  # most responses in the scripts, which a browser holds in memory
PER_SCRIPT = 4_000  # responses per script


@dataclass
class BrowserData:
    """Responses in the format of the page's script.

    Attributes:
        rows: the prompts.
        samples: the responses. `row` is an index into `rows`.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    _indices: dict[str, int] = field(default_factory=dict)

    def add(self, record: dict[str, Any]) -> None:
        """Add one record of the rollout files."""
        if record["row"] not in self._indices:
            self._indices[record["row"]] = len(self.rows)
            self.rows.append(_row(record))
        self.samples.append(_sample(record, self._indices[record["row"]]))

    def as_json(self) -> dict[str, Any]:
        """`rows` and `samples` as a JSON object."""
        return {"rows": self.rows, "samples": self.samples}


def write_browser(folder: RunFolder, seed: int = 0) -> dict[str, Any] | None:
    """Write the browser's scripts and return its data for the page. None if the run saved no rollouts.

    If the page holds only a sample, all responses, or as many as a browser can hold, are written to `rollouts_page/`
    next to it. `seed` chooses the samples.

    Returns:
        A JSON object with `total`, the number of saved responses; `rows` and `samples` as in `BrowserData`; `parts`,
        the number of scripts; and `loadable`, the number of responses in the scripts.
    """
    if not folder.rollouts.is_dir():
        return None
    from metaalign_rl.monitoring.rollout_table import count_rollouts

    total, size = count_rollouts(folder.rollouts)
    if not total:
        return None
    generator = random.Random(seed)
    in_page = set(generator.sample(range(total), min(total, IN_PAGE, 1 + IN_PAGE_BYTES * total // size)))
    loadable = set(generator.sample(range(total), min(total, IN_SCRIPTS, 1 + IN_SCRIPTS_BYTES * total // size)))
    if len(in_page) == total:
        loadable = set()
    page, parts = BrowserData(), -(-len(loadable) // PER_SCRIPT)
    replace_folder(folder.rollouts_page, lambda path: _write_parts(folder.rollouts, path, page, in_page, loadable))
    if not parts:
        folder.rollouts_page.rmdir()
    return {"total": total, **page.as_json(), "parts": parts, "loadable": len(loadable)}


def _write_parts(rollouts: Path, folder: Path, page: BrowserData, in_page: set[int], loadable: set[int]) -> None:
    """Fill `page` and write the scripts, in one pass over the rollout files."""
    from metaalign_rl.monitoring.rollout_table import read_rollouts_at

    part, number = BrowserData(), 0
    for index, record in read_rollouts_at(rollouts, in_page | loadable):
        if index in in_page:
            page.add(record)
        if index in loadable:
            part.add(record)
        if len(part.samples) == PER_SCRIPT:
            _write_part(folder, number, part)
            part, number = BrowserData(), number + 1
    if part.samples:
        _write_part(folder, number, part)


def _write_part(folder: Path, number: int, part: BrowserData) -> None:
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
