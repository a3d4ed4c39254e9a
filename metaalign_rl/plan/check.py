"""Compares the estimate of a run with its measured times."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from metaalign_rl.config import loader
from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_jsonl
from metaalign_rl.plan.case import case_of
from metaalign_rl.plan.rates import CPU, find_device
from metaalign_rl.plan.speed import step_seconds
from metaalign_rl.plan.work import work_of

# The compared parts, by the parts of a step. Scoring overlaps with the rollout, so both are compared as one.
PARTS = {
    "rollout and reward": ("rollout", "reward"),
    "reference": ("reference",),
    "learn": ("learn",),
    "transfer": ("transfer",),
}


def compare(run: Path, device: str = "", prompt_tokens: float | None = None) -> dict[str, dict[str, float]]:
    """Compare the estimate with the median step of a run.

    Args:
        run: the run's folder.
        device: name of the device that the run used; by default "cpu", or "h100" if the run had GPUs.
        prompt_tokens: mean length of the prompts; by default of the run's own prompts.

    Returns:
        For each part of a step, and for "step": the seconds "estimated" and "measured", and their "ratio".

    Raises:
        UserError: the folder has no PPO steps, or the model is of a kind that is not estimated.
    """
    folder = RunFolder(run)
    if not folder.metrics.is_file():
        raise UserError(f"{run}: no {folder.metrics.name} there; give the folder of a run with the stage ppo")
    steps = [line for _, line in read_jsonl(folder.metrics)]
    config = loader.load_saved(Config, folder.config, [f"run.root={run.absolute().parent}", f"run.name={run.name}"])
    gpus = config.cluster.gpus
    found = find_device(device or ("h100" if gpus else CPU), config.cluster.cpus)
    case = case_of(config, found, nodes=-(-gpus // 8) or 1)
    if case is None:
        raise UserError(f"{run}: cannot estimate the model {config.model.path!r}, because its shape is not known")
    lengths = prompt_tokens or mean_prompt_tokens(folder), fmean(step["response_tokens"] for step in steps)
    case = replace(case, work=work_of(config, *lengths))
    return _table(step_seconds(case), steps)


def mean_prompt_tokens(folder: RunFolder, rows: int = 500) -> float:
    """The mean length in tokens of the first `rows` prompts of a run."""
    from metaalign_rl.core.meta_prompt import encode_row
    from metaalign_rl.core.rows import read_rows
    from metaalign_rl.core.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(folder.policy if folder.policy.is_dir() else folder.sft)
    lengths = []
    for _, row in zip(range(rows), read_rows(folder.rows("prompts")), strict=False):
        ids = encode_row(tokenizer, row, max_tokens=10**6)
        lengths.append(len(ids))
    return fmean(lengths)


def _table(estimated: dict[str, float], steps: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    found = {}
    for name, parts in PARTS.items():
        measured = median(sum(step.get(f"seconds_{part}", 0.0) for part in parts) for step in steps)
        found[name] = _entry(sum(estimated[part] for part in parts), measured)
    sums = [sum(entry[kind] for entry in found.values()) for kind in ("estimated", "measured")]
    return found | {"step": _entry(*sums)}


def _entry(estimated: float, measured: float) -> dict[str, float]:
    ratio = estimated / measured if measured else float("nan")
    return {"estimated": estimated, "measured": measured, "ratio": ratio}


def render(found: dict[str, dict[str, float]]) -> str:
    """The comparison as a table."""
    lines = ["                      estimated   measured   ratio"]
    for name, entry in found.items():
        lines.append(f"{name:<20} {entry['estimated']:>9.3f} s {entry['measured']:>8.3f} s {entry['ratio']:>7.2f}")
    return "\n".join(lines)
