"""The log of PPO's metrics: `metrics.jsonl`, and further backends."""

from pathlib import Path
from typing import Protocol

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Metrics
from metaalign_rl.core.files import append_jsonl, read_log, write_jsonl
from metaalign_rl.monitoring.alarms import AlarmMonitor


class MetricsBackend(Protocol):
    """A further destination of the metrics."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Record a step's metrics. A step that is repeated after a resume is written again."""

    def close(self) -> None:
        """Release resources. Called once, when the run ends or fails."""


class MetricsLogger:
    """Appends each step's metrics to `path`, passes them to the backends and prints new alarms.

    A step that is repeated after a resume replaces its line. Use the logger as a context manager, which closes the
    backends.
    """

    def __init__(self, path: Path, *backends: MetricsBackend) -> None:
        self._path, self._backends = path, backends
        self._alarms: AlarmMonitor | None = None  # created by the first write, with the steps of the file
        self._last = 0  # the last step written

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, *error: object) -> None:
        for backend in self._backends:
            backend.close()

    def write(self, metrics: Metrics) -> None:
        """Write a step's metrics, with `alarm` added: 1 while an alarm is active, else 0.

        Args:
            metrics: with the key `step`, from 1.
        """
        step = int(metrics["step"])
        if self._alarms is None or step <= self._last:
            self._alarms = self._rewind(step)
        self._last = step
        for alarm in self._alarms.update(metrics):
            print(alarm, flush=True)
        metrics = {**metrics, "alarm": float(self._alarms.active)}
        append_jsonl(self._path, metrics)
        for backend in self._backends:
            backend.write(step, metrics)

    def _rewind(self, step: int) -> AlarmMonitor:
        """Drop the lines from `step` on, and return a monitor that knows the lines before."""
        lines = list(read_log(self._path))
        before = [line for line in lines if line["step"] < step]
        if len(before) < len(lines):
            write_jsonl(self._path, before)
        alarms = AlarmMonitor()
        for line in before:
            alarms.update(line)
        return alarms


def open_metrics_logger(config: Config, folder: RunFolder) -> MetricsLogger:
    """A run's logger, with TensorBoard, Prometheus through Ray, and Weights & Biases if `run.wandb_project` is set."""
    from metaalign_rl.monitoring.backends import PrometheusBackend, TensorBoardBackend, WandbBackend

    backends: list[MetricsBackend] = [TensorBoardBackend(folder.root / "tensorboard"), PrometheusBackend(config)]
    if config.run.wandb_project:
        backends.append(WandbBackend(config.run.wandb_project, config, folder.root))
    return MetricsLogger(folder.metrics, *backends)
