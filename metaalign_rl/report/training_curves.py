"""PPO's part of the page: the curves, the alarms, the faults and the time per part of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.dataflow import Metrics
from metaalign_rl.core.files import read_log
from metaalign_rl.monitoring.alarms import Alarm, find_alarms
from metaalign_rl.monitoring.metric_registry import PARTS

MAX_POINTS = 1000  # per curve; in a longer run each point is the mean of several steps

Columns = dict[str, list[float | None]]


@dataclass(frozen=True)
class TrainingSummary:
    """A run's PPO stage.

    Attributes:
        steps: number of steps.
        responses: number of responses in all steps.
        seconds: wall time of all steps.
        columns: the metrics by name, one value per point; None if a point has no finite value.
        steps_per_point: number of steps per point.
        shares: share of `seconds` by part of a step.
        alarms: the run's alarms, in order.
        faults: the lines of `faults.jsonl`.
    """

    steps: int
    responses: int
    seconds: float
    columns: Columns
    steps_per_point: int
    shares: dict[str, float]
    alarms: list[Alarm]
    faults: list[dict[str, Any]]


def read_training(folder: RunFolder) -> TrainingSummary | None:
    """Read the run's metrics and faults. None before its first step."""
    steps = list(read_log(folder.metrics))
    if not steps:
        return None
    seconds = _total(steps, "seconds_step")
    parts = {part: _total(steps, f"seconds_{part}") for part in PARTS}
    steps_per_point = -(-len(steps) // MAX_POINTS)
    return TrainingSummary(
        steps=len(steps),
        responses=int(_total(steps, "samples")),
        seconds=seconds,
        columns=_columns(steps, steps_per_point),
        steps_per_point=steps_per_point,
        shares={part: value / seconds for part, value in parts.items() if value},
        alarms=find_alarms(steps),
        faults=list(read_log(folder.faults)),
    )


def _total(steps: Sequence[Metrics], name: str) -> float:
    return sum(step.get(name, 0.0) for step in steps)


def _columns(steps: Sequence[Metrics], steps_per_point: int) -> Columns:
    points = [steps[start : start + steps_per_point] for start in range(0, len(steps), steps_per_point)]
    names = dict.fromkeys(name for step in steps for name in step)
    columns = {name: [_mean([step[name] for step in point if name in step]) for point in points] for name in names}
    return columns | {"step": [point[-1]["step"] for point in points]}


def _mean(values: Sequence[float]) -> float | None:
    """The mean of the finite values, to 5 digits."""
    finite = [value for value in values if isfinite(value)]
    return float(f"{sum(finite) / len(finite):.5g}") if finite else None
