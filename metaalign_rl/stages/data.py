"""The data stage: rows of every use, as JSONL files in the run's folder."""

from collections.abc import Callable
from pathlib import Path

from metaalign_rl.config import Config, DataConfig
from metaalign_rl.data import gold
from metaalign_rl.errors import UserError
from metaalign_rl.files import write_jsonl
from metaalign_rl.schema import Row, read_rows

Uses = dict[str, list[Row]]


def build(config: Config, folder: Path) -> None:
    """Write the rows that `config.data` asks for to `folder`, one file a use.

    Raises:
        UserError: a source that is missing or holds a bad row, with file, line and field.
    """
    uses = SOURCES[config.data.source](config.data, config.run.seed)
    for use, rows in uses.items():
        write_jsonl(folder / f"{use}.jsonl", (row.to_json() for row in rows))
    print("data: " + ", ".join(f"{len(rows):,} {use.replace('_', ' ')}" for use, rows in uses.items()))


def _world(data: DataConfig, seed: int) -> Uses:
    from metaalign_rl.data.world import build as world

    return {
        "demonstrations": world.demonstrations(seed, data.demonstrations),
        "pairs": world.pairs(seed, data.pairs, held_out=False),
        "prompts": world.prompts(seed, data.prompts),
        "held_out_prompts": world.held_out_prompts(seed, data.held_out_prompts),
        "held_out_pairs": world.pairs(seed, data.held_out_pairs, held_out=True),
    }


def _jsonl(data: DataConfig, seed: int) -> Uses:
    folder = Path(data.path)
    if not folder.is_dir():
        raise UserError(f"data.path: {data.path!r} is not a folder; give the one that holds prompts.jsonl and its like")
    names = ("demonstrations", "pairs", "prompts", "held_out_prompts", "held_out_pairs")
    uses = {name: list(read_rows(folder / f"{name}.jsonl")) for name in names if (folder / f"{name}.jsonl").exists()}
    if not uses:
        raise UserError(f"data.path: {data.path!r} holds none of {', '.join(f'{name}.jsonl' for name in names)}")
    for row in (row for rows in uses.values() for row in rows):
        gold.judge(row, "probe")  # an unknown check is an error now, not in an hour
    return uses


def _verih(data: DataConfig, seed: int) -> Uses:
    from metaalign_rl.data.verih import read_verih

    source = read_verih(Path(data.path))
    for constraint, count in sorted(source.left_out.items()):
        print(f"data: {count} rows left out, their constraint has no check here: {constraint}")
    by_split = {split: [row for row in source.rows if row.tags["split"] == split] for split in ("train", "held_out")}
    return {"prompts": by_split["train"], "held_out_prompts": by_split["held_out"]}


SOURCES: dict[str, Callable[[DataConfig, int], Uses]] = {"world": _world, "jsonl": _jsonl, "verih": _verih}
