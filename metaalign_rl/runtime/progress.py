"""Progress from an actor to the screen: the actor streams `ProgressUpdate`s, the driver draws them."""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any

LINES = 10  # how many lines a bar becomes where the output is no terminal,
SECONDS = 60.0  # and how long it says nothing at most while it hears anything


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """How far a piece of work has come, and the figures worth showing beside it."""

    done: int
    total: int
    figures: dict[str, float] = field(default_factory=dict)


def stream(work: Callable[[Callable[[ProgressUpdate], None]], Any]) -> Iterator[ProgressUpdate]:
    """Run `work(report)` in a thread and yield what it reports, at once; its exception is raised here."""
    updates: SimpleQueue[ProgressUpdate | None] = SimpleQueue()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work(updates.put)
        except BaseException as error:  # handed on to the caller's thread
            failure.append(error)
        finally:
            updates.put(None)

    Thread(target=run, daemon=True).start()
    while (update := updates.get()) is not None:
        yield update
    if failure:
        raise failure[0]


def in_thread(work: Callable[[], Any]) -> Any:
    """Do work that starts OpenMP's threads in a thread that ends with it, and return its result.

    They live as long as the thread that first wanted them. While others live beside them, more in all than there are
    CPUs, they do not wait actively for their next task, which makes small models' training 1.6 times slower.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(work).result()


class ProgressBar:
    """A progress bar with figures and the time left; a few plain lines where the output is no terminal.

    Use as a context manager and call it with each `ProgressUpdate`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._terminal = sys.stderr.isatty()
        self._began = time.monotonic()
        self._printed, self._last = 0, self._began
        self._progress: Any = None

    def __enter__(self) -> "ProgressBar":
        if self._terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description:<10}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._progress = Progress(*columns)
            self._task = self._progress.add_task(self._name, total=None, figures="")
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress:
            self._progress.stop()

    def __call__(self, update: ProgressUpdate) -> None:
        figures = "  ".join(f"{name} {value:.3g}" for name, value in update.figures.items())
        if self._progress:
            self._progress.update(self._task, completed=update.done, total=update.total, figures=figures)
            return
        now, tenths = time.monotonic(), update.done * LINES // update.total
        if tenths > self._printed or now - self._last >= SECONDS:
            self._printed, self._last = tenths, now
            left = (now - self._began) / max(update.done, 1) * (update.total - update.done)
            print(f"{self._name:<10} {update.done}/{update.total}  {figures}  {left:.0f} s left", flush=True)
