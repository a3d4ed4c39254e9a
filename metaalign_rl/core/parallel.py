"""Spreads work on rows, such as tokenizing, over the CPUs that a process may use."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from metaalign_rl.core.errors import BadRows, UserError

T = TypeVar("T")
R = TypeVar("R")

FEWEST = 2_000  # rows; starting processes for fewer takes longer than it saves
CHUNK = 64  # rows that a process works on at a time


def map_rows(work: Callable[[T], R], rows: Iterable[T]) -> list[R]:
    """The results of `work` for all rows, in order. Many rows are split over as many processes as torch has threads.

    The processes are forked, so `work` may be any function. It must not start torch's threads.

    Raises:
        UserError: names all rows for which `work` raises one, see `BadRows`.
    """
    given, bad, results = list(rows), BadRows(), []
    for found in _in_processes(work, given) if len(given) >= FEWEST else _results(work, given):
        with bad.collect():
            if isinstance(found, UserError):
                raise found
            results.append(found)
    bad.require_none()
    return results


def _in_processes(work: Callable[[T], R], rows: list[T]) -> Iterator[R | UserError]:
    import torch
    from torch.utils.data import DataLoader

    threads = torch.get_num_threads()
    loader = DataLoader(
        rows,
        batch_size=CHUNK,
        collate_fn=partial(_results, work),
        num_workers=threads if threads > 1 else 0,
        multiprocessing_context="fork" if threads > 1 else None,
    )
    for part in loader:
        yield from part


def _results(work: Callable[[T], R], rows: Sequence[T]) -> list[Any]:
    """The result for each row, or the `UserError` that `work` raised."""

    def result(row: T) -> R | UserError:
        try:
            return work(row)
        except UserError as error:
            return error

    return [result(row) for row in rows]
