"""A pool of scorers: one process per device."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from metaalign_rl.core.errors import UserError
from reward.inference.windows import windows
from reward.score import Score
from reward.scorer import BATCH_TOKENS, AnyRow, Scorer, with_places

POOL_WINDOW = 64  # rows that a process gets at a time
WINDOWS_AHEAD = 2  # windows that wait for each process

_scorer: Scorer | Exception  # this process's scorer, or the error that loading it raised


class ScorerPool:
    """Scores as a `Scorer` does, with the rows spread over processes.

        with ScorerPool("reward-model", ["cuda:0", "cuda:1"]) as pool:
            scores = pool.score(rows)

    Args:
        model, dtype, max_tokens: see `Scorer.from_pretrained`.
        devices: one process for each. With `["cpu", "cpu"]` two processes share the cores.

    Raises:
        UserError: `devices` is empty.
    """

    def __init__(
        self, model: str | Path, devices: Sequence[str], dtype: str | None = None, max_tokens: int | None = None
    ) -> None:
        if not devices:
            raise UserError("devices: expected at least one, found none")
        spawn = get_context("spawn")  # a forked process cannot use CUDA
        numbers = spawn.Queue()
        for number in range(len(devices)):
            numbers.put(number)
        load = partial(Scorer.from_pretrained, model, dtype=dtype, max_tokens=max_tokens)
        self._processes = ProcessPoolExecutor(len(devices), spawn, _start, (load, list(devices), numbers))
        self._size = len(devices)

    def __enter__(self) -> "ScorerPool":
        return self

    def __exit__(self, *error: object) -> None:
        self._processes.shutdown(cancel_futures=True)

    def score(
        self, rows: Iterable[AnyRow], places: Iterable[str] | None = None, *, batch_tokens: int = BATCH_TOKENS
    ) -> list[Score]:
        """See `Scorer.score`."""
        return list(self.stream(rows, places, batch_tokens=batch_tokens))

    def stream(
        self, rows: Iterable[AnyRow], places: Iterable[str] | None = None, *, batch_tokens: int = BATCH_TOKENS
    ) -> Iterator[Score]:
        """See `Scorer.stream`. Each process gets one window of rows at a time."""
        pending: deque[Future[list[Score]]] = deque()
        for window in windows(with_places(rows, places), POOL_WINDOW):
            pending.append(self._processes.submit(_score, window, batch_tokens))
            if len(pending) > WINDOWS_AHEAD * self._size:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _start(load: partial[Scorer], devices: list[str], numbers: Any) -> None:
    """Load this process's scorer on a device that no other process has taken."""
    import torch

    global _scorer
    device = devices[numbers.get()]
    if device == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // devices.count("cpu")))
    try:
        _scorer = load(device=device)
    except Exception as error:  # raised here, it would reach the caller only as a broken pool
        _scorer = error


def _score(window: list[tuple[AnyRow, str]], batch_tokens: int) -> list[Score]:
    if isinstance(_scorer, Exception):
        raise _scorer
    rows, places = zip(*window, strict=True)
    return _scorer.score(rows, places, batch_tokens=batch_tokens)
