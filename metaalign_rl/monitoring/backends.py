"""TensorBoard, Prometheus through Ray, and Weights & Biases. Each loads its package when it is made."""

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

AGAIN = 1.0  # seconds between two settings of a gauge; Ray collects them every 10
Shown = tuple[str, float, dict[str, str]]  # a gauge's name without prefix, value and tags


class TensorBoardBackend:
    """A scalar a metric in a folder that TensorBoard reads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._last = 0

    def write(self, step: int, metrics: Metrics) -> None:
        """See `Sink`."""
        if step <= self._last:
            self.close()
        if self._writer is None or step <= self._last:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)  # what came after is done again
        self._last = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Sink`."""
        if self._writer is not None:
            self._writer.close()


class PrometheusBackend:
    """The names of `catalog.EXPORTED` on the page of metrics of the Ray node where the run's driver works.

    The run's name is a tag beside every value. Gauges are there from the start (the run's settings) or from the first
    step until `close`: Ray shows what a gauge was set to on one page and forgets it, so a thread sets all again.
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
        self._settings: list[Shown] = [("steps", config.ppo.steps, {}), ("max_mismatch", config.max_mismatch, {})]
        self._shown = self._settings
        self._steps = config.ppo.steps
        self._closed = Event()
        self._thread = Thread(target=self._show_again, name="metrics", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Metrics) -> None:
        """See `Sink`."""
        cuts = [(*metric_registry.split(key), value) for key, value in metrics.items()]
        answers = [(name, value, cut) for name, cut, value in cuts if name in metric_registry.ANSWERS]
        self._shown = [
            *self._settings,
            *answers,
            *((n, value, {}) for n, _, value in cuts if n in metric_registry.STEP),
        ]
        self._show()
        if step >= self._steps:
            self._metrics[metric_registry.PREFIX + "finished"].inc()
        self._metrics[metric_registry.PREFIX + "samples"].inc(metrics[metric_registry.SAMPLES])
        self._metrics[metric_registry.PREFIX + "step_seconds"].observe(metrics[metric_registry.STEP_SECONDS])
        for part in metric_registry.PARTS:
            if (seconds := metrics.get(f"seconds_{part}", 0.0)) > 0:  # a counter takes no 0
                self._metrics[metric_registry.PREFIX + "seconds"].inc(seconds, {"part": part})

    def close(self) -> None:
        """See `Sink`."""
        self._closed.set()
        self._thread.join()

    def _show_again(self) -> None:
        while not self._closed.is_set():
            self._show()
            self._closed.wait(AGAIN)

    def _show(self) -> None:
        for name, value, tags in self._shown:
            self._metrics[metric_registry.PREFIX + name].set(value, tags)


class WandbBackend:
    """A run on Weights & Biases, which goes on as the same one after a resume.

    Its id is kept in the run's folder. Of a step that is done again, W&B keeps the first values.
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
        """See `Sink`."""
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()
