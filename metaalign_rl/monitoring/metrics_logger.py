"""Where the metrics of PPO's steps go: `metrics.jsonl` always, and any number of sinks beside it."""

from pathlib import Path
from typing import Protocol

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Metrics
from metaalign_rl.core.files import append_jsonl, read_log, write_jsonl
from metaalign_rl.monitoring.alarms import AlarmMonitor


class MetricsBackend(Protocol):
    """One more place for the metrics."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Take in a step's metrics; a step that is done again after a resume comes again."""

    def close(self) -> None:
        """The run is over, or failed."""


class MetricsLogger:
    """Keeps each step's metrics as one line of `path`, hands them to the sinks and sounds the alarm.

    A step that is done again after a resume replaces its own line. Use as a context manager.
    """

    def __init__(self, path: Path, *sinks: MetricsBackend) -> None:
        self._path, self._sinks = path, sinks
        self._watch: AlarmMonitor | None = None  # knows the steps so far from the first write on
        self._last = 0  # step that was written

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, *error: object) -> None:
        for sink in self._sinks:
            sink.close()

    def write(self, metrics: Metrics) -> None:
        """Append a step's metrics, and `alarm`: 1 while something is wrong, which is said once."""
        step = int(metrics["step"])
        if self._watch is None or step <= self._last:
            self._watch = self._take_up(step)
        self._last = step
        for alarm in self._watch(metrics):
            print(alarm, flush=True)
        metrics = {**metrics, "alarm": float(self._watch.ringing)}
        append_jsonl(self._path, metrics)
        for sink in self._sinks:
            sink.write(step, metrics)

    def _take_up(self, step: int) -> AlarmMonitor:
        """Let a new watch know the steps before `step`, and drop the lines of those that are done again."""
        lines = list(read_log(self._path))
        before = [line for line in lines if line["step"] < step]
        if len(before) < len(lines):
            write_jsonl(self._path, before)
        watch = AlarmMonitor()
        for line in before:
            watch(line)
        return watch


def open_metrics_logger(config: Config, folder: RunFolder) -> MetricsLogger:
    """The log of a run: TensorBoard, Ray's metrics, and Weights & Biases where the config names a project."""
    from metaalign_rl.monitoring.backends import PrometheusBackend, TensorBoardBackend, WandbBackend

    sinks: list[MetricsBackend] = [TensorBoardBackend(folder.root / "tensorboard"), PrometheusBackend(config)]
    if config.run.wandb_project:
        sinks.append(WandbBackend(config.run.wandb_project, config, folder.root))
    return MetricsLogger(folder.metrics, *sinks)
