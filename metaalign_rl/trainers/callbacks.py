"""What the ranks of transformers' Trainer have in common: they report, and they stop when asked, with a checkpoint."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from metaalign_rl.runtime.progress import ProgressUpdate

FIGURES = ("loss", "accuracy")


class Stopped(RuntimeError):
    """A training was asked to stop and did, after the step under way; its checkpoint is there."""


class StopRequest:
    """Lets a thread of a rank's process end the training that another one runs."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def set(self) -> None:
        """Ask for the end."""
        self._asked.set()

    def callback(self) -> Any:
        """The Trainer's callback that saves after the step under way and raises `Stopped`, on all ranks alike."""
        from transformers import TrainerCallback

        request = self

        class Callback(TrainerCallback):
            is_last = False

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.is_last = request._is_agreed(args.device)
                control.should_save = control.should_save or self.is_last

            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if self.is_last:
                    raise Stopped(f"stopped after step {state.global_step}")

        return Callback()

    def _is_agreed(self, device: Any) -> bool:
        """Whether any rank was asked: they must end after the same step."""
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            return self._asked.is_set()
        asked = torch.tensor(float(self._asked.is_set()), device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)


def reporter(report: Callable[[ProgressUpdate], None]) -> Any:
    """The Trainer's callback that reports what it logs."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                figures = {name: float(logs[name]) for name in FIGURES if name in logs}
                report(ProgressUpdate(state.global_step, state.max_steps, figures))

    return Reporter()


CONTROL = "control"  # the actors' second thread, in which `stop` runs while they train


def as_trainer(worker: type) -> Any:
    """A Ray actor of a class with the methods `train` and `stop`, which may run at the same time."""
    import ray

    return ray.remote(concurrency_groups={CONTROL: 1})(worker)


@contextmanager
def saved_when_stopped(ranks: Sequence[Any], streams: Sequence[Any]) -> Iterator[None]:
    """On `KeyboardInterrupt` inside, have the ranks of `streams` save after the step under way before it goes on."""
    import ray

    try:
        yield
    except KeyboardInterrupt:
        for rank in ranks:
            rank.stop.options(concurrency_group=CONTROL).remote()
        for stream in streams:
            with suppress(ray.exceptions.RayError):  # that it has stopped
                for update in stream:
                    ray.get(update)
        raise
