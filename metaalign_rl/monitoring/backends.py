"""Backends of the metrics: TensorBoard, Prometheus through Ray, and Weights & Biases.

Each imports its package when it is created.
"""

import secrets
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Metrics
from metaalign_rl.core.files import write_text
from metaalign_rl.monitoring import metric_registry

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

REFRESH_S = 1.0  # seconds between two updates of the gauges; Ray collects them every 10 s
GaugeValue = tuple[str, float, dict[str, str]]  # name without prefix, value, tags


class TensorBoardBackend:
    """Writes one scalar per metric to a folder for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._last = 0

    def write(self, step: int, metrics: Metrics) -> None:
        """See `MetricsBackend`."""
        if step <= self._last:
            self.close()
        if self._writer is None or step <= self._last:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)  # later steps are repeated
        self._last = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `MetricsBackend`."""
        if self._writer is not None:
            self._writer.close()


class PrometheusBackend:
    """Exports the metrics of `metric_registry.EXPORTED` on the metrics page of the driver's Ray node.

    Every metric has the run's name as the tag `run`. The gauges of settings exist from the start, the other gauges from
    the first step, all until `close`. Ray exports a gauge's value once and then forgets it, so a thread sets all gauges
    repeatedly.
    """

    def __init__(self, config: Config) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        kinds = {"gauge": Gauge, "counter": Counter, "histogram": Histogram}
        self._metrics: dict[str, Any] = {}
        for name, exported in metric_registry.EXPORTED.items():
            buckets = (
                {"boundaries": [float(s) for s in metric_registry.SECONDS]} if exported.kind == "histogram" else {}
            )
            metric = kinds[exported.kind](name, exported.description, tag_keys=exported.tags, **buckets)
            self._metrics[name] = metric.set_default_tags({"run": config.run.name})
        self._settings: list[GaugeValue] = [("steps", config.ppo.steps, {}), ("max_mismatch", config.max_mismatch, {})]
        self._gauges = self._settings
        self._steps = config.ppo.steps
        self._closed = Event()
        self._thread = Thread(target=self._refresh, name="metrics", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Metrics) -> None:
        """See `MetricsBackend`."""
        found = [(*metric_registry.split(key), value) for key, value in metrics.items()]
        by_tag = [(name, value, tags) for name, tags, value in found if name in metric_registry.RESPONSE_METRICS]
        single: list[GaugeValue] = [
            (name, value, {}) for name, _, value in found if name in metric_registry.STEP_METRICS
        ]
        self._gauges = [*self._settings, *by_tag, *single]
        self._set_gauges()
        if step >= self._steps:
            self._metrics[metric_registry.PREFIX + "finished"].inc()
        self._metrics[metric_registry.PREFIX + "samples"].inc(metrics[metric_registry.SAMPLES])
        self._metrics[metric_registry.PREFIX + "step_seconds"].observe(metrics[metric_registry.STEP_SECONDS])
        for part in metric_registry.PARTS:
            if (seconds := metrics.get(f"seconds_{part}", 0.0)) > 0:  # Ray's counters reject 0
                self._metrics[metric_registry.PREFIX + "seconds"].inc(seconds, {"part": part})

    def close(self) -> None:
        """See `MetricsBackend`."""
        self._closed.set()
        self._thread.join()

    def _refresh(self) -> None:
        while not self._closed.is_set():
            self._set_gauges()
            self._closed.wait(REFRESH_S)

    def _set_gauges(self) -> None:
        for name, value, tags in self._gauges:
            self._metrics[metric_registry.PREFIX + name].set(value, tags)


class WandbBackend:
    """Logs to a Weights & Biases run. A resumed run continues the same W&B run.

    The W&B run's id is kept in `wandb-run-id` in the run's folder. For a step that is repeated, W&B keeps the first
    values.
    """

    def __init__(self, project: str, config: Config, folder: Path) -> None:
        import wandb

        path = folder / "wandb-run-id"
        if not path.is_file():
            write_text(path, secrets.token_hex(8))
        self._run = wandb.init(
            project=project,
            name=config.run.name,
            id=path.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=asdict(config),
        )

    def write(self, step: int, metrics: Metrics) -> None:
        """See `MetricsBackend`."""
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """See `MetricsBackend`."""
        self._run.finish()
