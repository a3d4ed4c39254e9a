"""TensorBoard, Prometheus through Ray, and Weights & Biases. Each loads its package when it is made."""

import secrets
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaalign_rl.config import Config
from metaalign_rl.files import write_text
from metaalign_rl.ppo import catalog
from metaalign_rl.ppo.metrics import Metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
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


class RayMetrics:
    """The names of `catalog.EXPORTED` on the page of metrics of the Ray node where the run's driver works.

    Args:
        run: its name, a tag beside every value.
    """

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        kinds = {"gauge": Gauge, "counter": Counter, "histogram": Histogram}
        self._metrics: dict[str, Any] = {}
        for name, exported in catalog.EXPORTED.items():
            buckets = {"boundaries": [float(s) for s in catalog.SECONDS]} if exported.kind == "histogram" else {}
            metric = kinds[exported.kind](name, exported.description, tag_keys=exported.tags, **buckets)
            self._metrics[name] = metric.set_default_tags({"run": run})

    def write(self, step: int, metrics: Metrics) -> None:
        """See `Sink`."""
        for key, value in metrics.items():
            name, cut = catalog.split(key)
            if name in catalog.ANSWERS:
                self._metrics[catalog.PREFIX + name].set(value, cut)
            elif name in catalog.STEP:
                self._metrics[catalog.PREFIX + name].set(value)
        self._metrics[catalog.PREFIX + "samples"].inc(metrics[catalog.SAMPLES])
        self._metrics[catalog.PREFIX + "step_seconds"].observe(metrics[catalog.STEP_SECONDS])
        for part in catalog.PARTS:
            if (seconds := metrics.get(f"seconds_{part}", 0.0)) > 0:  # a counter takes no 0
                self._metrics[catalog.PREFIX + "seconds"].inc(seconds, {"part": part})

    def close(self) -> None:
        """See `Sink`."""


class WandB:
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
