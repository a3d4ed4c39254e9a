"""Callbacks for transformers' Trainer: report metrics, and stop with a checkpoint. Also the actors that use them."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from metaalign_rl.runtime.progress import ProgressUpdate

SHOWN_METRICS = ("loss", "accuracy")
MAX_SILENCE = 5.0  # seconds; after a longer silence, the next step is reported
CONTROL = "control"  # concurrency group of a trainer actor's second thread, which runs `stop` during `train`


class TrainingStopped(RuntimeError):
    """A training stopped on request, after a step and with a checkpoint."""


class StopRequest:
    """Lets one thread of a rank stop the training that runs in another thread."""

    def __init__(self) -> None:
        self._is_set = threading.Event()

    def set(self) -> None:
        """Request the stop."""
        self._is_set.set()

    def callback(self) -> Any:
        """A Trainer callback that saves after the current step and raises `TrainingStopped`, on all ranks."""
        from transformers import TrainerCallback

        request = self

        class Callback(TrainerCallback):
            is_last = False

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.is_last = request._any_rank_stops(args.device)
                control.should_save = control.should_save or self.is_last

            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if self.is_last:
                    raise TrainingStopped(f"stopped after step {state.global_step}")

        return Callback()

    def _any_rank_stops(self, device: Any) -> bool:
        """Whether any rank has a request. All ranks must stop after the same step."""
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            return self._is_set.is_set()
        flag = torch.tensor(float(self._is_set.is_set()), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


def report_callback(report: Callable[[ProgressUpdate], None]) -> Any:
    """A Trainer callback that passes the step and the logged metrics to `report`.

    The Trainer logs once in several steps. If these steps are slow, some of them are also reported, with the metrics
    that were logged last.
    """
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def __init__(self) -> None:
            self.metrics: dict[str, float] = {}
            self.last = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if time.monotonic() - self.last >= MAX_SILENCE:
                self._report(state)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.metrics = {name: float(logs[name]) for name in SHOWN_METRICS if name in logs}
                self._report(state)

        def _report(self, state: Any) -> None:
            self.last = time.monotonic()
            report(ProgressUpdate(state.global_step, state.max_steps, self.metrics))

    return Callback()


def trainer_actor(worker: type) -> Any:
    """Make a Ray actor class of a class with the methods `train` and `stop`, which may run at the same time."""
    import ray

    return ray.remote(concurrency_groups={CONTROL: 1})(worker)


@contextmanager
def save_on_interrupt(ranks: Sequence[Any], streams: Sequence[Any]) -> Iterator[None]:
    """On `KeyboardInterrupt`, stop the ranks, wait until they have saved after their current step, and raise it again.

    Args:
        ranks: trainer actors; see `trainer_actor`.
        streams: the results of their `train`.
    """
    import ray

    try:
        yield
    except KeyboardInterrupt:
        for rank in ranks:
            rank.stop.options(concurrency_group=CONTROL).remote()
        for stream in streams:
            with suppress(ray.exceptions.RayError):  # `TrainingStopped`
                for update in stream:
                    ray.get(update)
        raise
