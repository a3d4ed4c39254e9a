"""Long inputs in windows, and a prefetch of the next window."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def windows(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Split the items into lists of `size`; the last list may be shorter."""
    rest = iter(items)
    while window := list(islice(rest, size)):
        yield window


def prefetch(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)` for each item. While a result is in use, a thread computes the next one."""
    with ThreadPoolExecutor(1) as thread:
        current: Future[Result] | None = None
        for item in items:
            upcoming = thread.submit(function, item)
            if current is not None:
                yield current.result()
            current = upcoming
        if current is not None:
            yield current.result()
