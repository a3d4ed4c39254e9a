"""What a page shows of PPO's steps: their curves, the alarms, the faults, and where the time went."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.dataflow import Metrics
from metaalign_rl.core.files import read_log
from metaalign_rl.monitoring.alarms import Alarm, episodes
from metaalign_rl.monitoring.metric_registry import PARTS

POINTS = 1000  # of a curve; a longer run's points are means over several steps

Columns = dict[str, list[float | None]]


@dataclass(frozen=True)
class Training:
    """A run's PPO.

    Attributes:
        columns: the metrics by name, one value a point; None where a point lacks one.
        each: how many steps a point stands for.
        shares: of all seconds, by part of a step.
        faults: the lines of `faults.jsonl`.
    """

    steps: int
    answers: int
    seconds: float
    columns: Columns
    each: int
    shares: dict[str, float]
    alarms: list[Alarm]
    faults: list[dict[str, Any]]


def read_training(folder: RunFolder) -> Training | None:
    """What a run's files say; None before its first step."""
    steps = list(read_log(folder.metrics))
    if not steps:
        return None
    seconds = _total(steps, "seconds_step")
    parts = {part: _total(steps, f"seconds_{part}") for part in PARTS}
    each = -(-len(steps) // POINTS)
    return Training(
        steps=len(steps),
        answers=int(_total(steps, "samples")),
        seconds=seconds,
        columns=_columns(steps, each),
        each=each,
        shares={part: value / seconds for part, value in parts.items() if value},
        alarms=episodes(steps),
        faults=list(read_log(folder.faults)),
    )


def _total(steps: Sequence[Metrics], name: str) -> float:
    return sum(step.get(name, 0.0) for step in steps)


def _columns(steps: Sequence[Metrics], each: int) -> Columns:
    points = [steps[start : start + each] for start in range(0, len(steps), each)]
    names = dict.fromkeys(name for step in steps for name in step)
    columns = {name: [_mean([step[name] for step in point if name in step]) for point in points] for name in names}
    return columns | {"step": [point[-1]["step"] for point in points]}


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if isfinite(value)]
    return float(f"{sum(known) / len(known):.5g}") if known else None
