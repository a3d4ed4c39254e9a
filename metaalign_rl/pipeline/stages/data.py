"""The data stage: write the rows for every use as JSONL files in the run's folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from metaalign_rl.config.schema import Config, DataConfig
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import BadRows, UserError
from metaalign_rl.core.files import write_jsonl
from metaalign_rl.core.rows import read_checked_rows
from metaalign_rl.data import public
from metaalign_rl.data.row_checks import check_use

Uses = dict[str, list[Row]]  # rows by use
ENDINGS = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
USES = ("demonstrations", "pairs", "prompts", "held_out_prompts", "held_out_pairs", "paraphrases")


def run(config: Config, folder: Path) -> None:
    """Write the rows, as `build`, after checking that each stage of the run has the rows it needs.

    Raises:
        UserError: as `build`, or a stage of `run.stages` has no rows.
    """
    uses = _read(config)
    for stage in config.run.stages:
        _require_rows(stage, config, uses)
    _write(uses, folder)


def build(config: Config, folder: Path) -> None:
    """Write the rows of `config.data` to `folder`, one file per use.

    Raises:
        UserError: the source is missing or has a bad row; names file, line and field.
    """
    _write(_read(config), folder)


def _read(config: Config) -> Uses:
    return SOURCES[config.data.source](config.data, config.run.seed)


def _write(uses: Uses, folder: Path) -> None:
    for use, rows in uses.items():
        write_jsonl(folder / f"{use}.jsonl", (row.to_json() for row in rows))
    print("data: " + ", ".join(f"{len(rows):,} {use.replace('_', ' ')}" for use, rows in uses.items()))


def _require_rows(stage: str, config: Config, uses: Uses) -> None:
    needed = {"sft": "demonstrations", "reward": "pairs", "ppo": "prompts", "evaluate": "held_out_prompts"}
    use = needed.get(stage)
    if use is None or uses.get(use) or (stage == "reward" and config.reward.path):
        return
    where = (
        Path(config.data.path) / f"{use}.jsonl"
        if config.data.source == "jsonl"
        else config.data.path or config.data.source
    )
    if use == "held_out_prompts" and config.data.source in public.ADAPTERS:
        raise UserError(
            f"{where}: expected held-out prompts for the stage {stage}, found none, because no program can check "
            "responses to this data; remove evaluate and report from run.stages (the stage reward evaluates on the "
            "held-out pairs)"
        )
    remedies = {"sft": " and give a checkpoint as model.path", "reward": ", or give a reward model as reward.path"}
    raise UserError(
        f"{where}: expected {use.replace('_', ' ')} for the stage {stage}, found none; add some, "
        f"or remove {stage} from run.stages{remedies.get(stage, '')}"
    )


def _world(data: DataConfig, seed: int) -> Uses:
    from metaalign_rl.data.world import build as world

    return {
        "demonstrations": world.demonstrations(seed, data.demonstrations, data.follow_rate),
        "pairs": world.pairs(seed, data.pairs, held_out=False),
        "prompts": world.prompts(seed, data.prompts),
        "held_out_prompts": world.held_out_prompts(seed, data.held_out_prompts),
        "held_out_pairs": [
            *world.pairs(seed, data.held_out_pairs, held_out=True),
            *world.paraphrased_pairs(seed, data.paraphrased_wishes),
        ],
        "paraphrases": world.paraphrases(seed, data.paraphrased_wishes),
    }


def _jsonl(data: DataConfig, seed: int) -> Uses:
    folder = Path(data.path)
    if not folder.is_dir():
        raise UserError(f"data.path: expected a folder with files such as prompts.jsonl, found {data.path!r}")
    files = {use: path for use in USES if (path := _file(folder, use))}
    if not files:
        names = ", ".join(f"{name}.jsonl" for name in USES)
        raise UserError(f"data.path: expected a folder with at least one of {names}, found {data.path!r}")
    bad = BadRows()
    uses = {use: read_checked_rows(path, partial(check_use, use), bad) for use, path in files.items()}
    bad.require_none()
    return uses


def _file(folder: Path, use: str) -> Path | None:
    """The file of a use; None if there is none.

    Raises:
        UserError: there are several.
    """
    found = [path for ending in ENDINGS if (path := folder / f"{use}{ending}").exists()]
    if len(found) > 1:
        raise UserError(f"data.path: expected one file of {use}, found {' and '.join(map(str, found))}; remove one")
    return found[0] if found else None


def _verih(data: DataConfig, seed: int) -> Uses:
    from metaalign_rl.data.verih import read_verih

    source = read_verih(Path(data.path))
    for constraint, count in sorted(source.left_out.items()):
        print(f"data: {count} rows left out, because their constraint has no check: {constraint}")
    by_split = {split: [row for row in source.rows if row.tags["split"] == split] for split in ("train", "held_out")}
    return {"prompts": by_split["train"], "held_out_prompts": by_split["held_out"]}


def _public(data: DataConfig, seed: int) -> Uses:
    """Training pairs, held-out pairs, and the prompts of the training pairs. Public data has no checks."""
    found = public.read_public(data.source, data.path)
    for what, count in sorted(found.left_out.items()):
        print(f"data: {count:,} {what}, left out")
    pairs = public.take(found.train, data.pairs, seed)
    held_out = public.take(found.held_out, data.held_out_pairs, seed)
    for setting, taken, all_rows in (("pairs", pairs, found.train), ("held_out_pairs", held_out, found.held_out)):
        if len(taken) < len(all_rows):
            print(f"data: {len(taken):,} of {len(all_rows):,} {setting.replace('_', ' ')}, as data.{setting} says")
    uses = {"pairs": pairs, "held_out_pairs": held_out, "prompts": public.prompts(pairs, data.prompts)}
    return {use: rows for use, rows in uses.items() if rows}


SOURCES: dict[str, Callable[[DataConfig, int], Uses]] = {
    "world": _world,
    "jsonl": _jsonl,
    "verih": _verih,
    **dict.fromkeys(public.ADAPTERS, _public),
}
