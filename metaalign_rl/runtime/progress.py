"""Progress bars: an actor streams `ProgressUpdate`s, the driver draws them."""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any

# If standard error is no terminal, a bar becomes plain lines: one per tenth of the task, and one for an update that
# arrives this many seconds after the last line.
LINES = 10
MAX_SILENCE = 60.0


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """The state of a task: `done` of `total` units, and the metrics to show next to the bar."""

    done: int
    total: int
    metrics: dict[str, float] = field(default_factory=dict)


def stream(work: Callable[[Callable[[ProgressUpdate], None]], Any]) -> Iterator[ProgressUpdate]:
    """Run `work(report)` in a thread and yield each reported update immediately. Raises an exception of `work` here."""
    updates: SimpleQueue[ProgressUpdate | None] = SimpleQueue()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work(updates.put)
        except BaseException as error:  # raised again in the caller's thread
            failure.append(error)
        finally:
            updates.put(None)

    Thread(target=run, daemon=True).start()
    while (update := updates.get()) is not None:
        yield update
    if failure:
        raise failure[0]


def in_thread(work: Callable[[], Any]) -> Any:
    """Run `work` in a temporary thread and return its result; use it for work that starts OpenMP threads.

    OpenMP threads live as long as the thread that started them. If the process has more of them than CPUs, they do not
    spin while they wait, which makes the training of small models 1.6 times slower.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(work).result()


class ProgressBar:
    """A progress bar with metrics and the time left; plain lines if standard error is no terminal.

    Use it as a context manager and call it with each `ProgressUpdate`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._terminal = sys.stderr.isatty()
        self._printed, self._last = 0, time.monotonic()
        self._first: tuple[float, int] | None = None  # time and units of the first update, after the start-up
        self._bar: Any = None

    def __enter__(self) -> "ProgressBar":
        if self._terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description:<10}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
            )
            self._bar = Progress(*columns)
            self._task = self._bar.add_task(self._name, total=None, metrics="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, update: ProgressUpdate) -> None:
        """Draw an update, or print a line if one is due."""
        metrics = "  ".join(f"{name} {value:.3g}" for name, value in update.metrics.items())
        if self._bar:
            self._bar.update(self._task, completed=update.done, total=update.total, metrics=metrics)
            return
        now, tenths = time.monotonic(), update.done * LINES // update.total
        self._first = self._first or (now, update.done)
        if tenths > self._printed or now - self._last >= MAX_SILENCE:
            self._printed, self._last = tenths, now
            print(f"{self._name:<10} {update.done}/{update.total}  {metrics}{self._left(now, update)}", flush=True)

    def _left(self, now: float, update: ProgressUpdate) -> str:
        """The time left at the speed since the first update; nothing at the first one, before which actors start."""
        assert self._first is not None
        began, done = self._first
        if update.done <= done:
            return ""
        return f"  {(now - began) / (update.done - done) * (update.total - update.done):.0f} s left"
