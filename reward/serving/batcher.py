"""The batcher: scores the texts of concurrent requests together."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush

from reward.serving.server_metrics import ServerMetrics

Logits = list[float]
ScoreTexts = Callable[[Sequence[list[int]]], list[Logits]]
SPEED_DECAY = 0.8  # weight of the earlier batches in the moving average of the speed
BATCH_SECONDS = 0.5  # of a batch, by the speed so far: a new request waits no longer for its turn
FIRST_BATCH_TOKENS = 1024  # while the speed is unknown
FIRST_SPEED = 1000.0  # the same, for the order of requests
MOST_OF_QUEUE = 0.75  # that one request can fill, so that small requests still get in
_DEVICE_FAULTS = ("CUDA error", "HIP error", "device-side assert")


class QueueFull(Exception):
    """Too many tokens are waiting; the client should try again after `seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class CannotScore(RuntimeError):
    """The batcher has stopped, or its device no longer works. Only a new process can score."""


@dataclass(slots=True)
class _PendingText:
    ids: list[int]
    done: "asyncio.Future[Logits]" = field(repr=False)


@dataclass(slots=True, eq=False)
class _Request:
    """One request.

    Attributes:
        tokens: those not yet scored; an estimate until the texts are known.
        arrived: when the texts were known, in seconds.
        waiting: the texts that no batch has.
    """

    tokens: int
    arrived: float = 0.0
    waiting: deque[_PendingText] = field(default_factory=deque)


class Batcher:
    """Collects texts until a batch is full or its first text has waited `max_wait`, then scores them in one thread.

    Requests are scored in the order in which they would end if each had the device alone. So a small request does not
    wait for a large one that came before, and a large one is not overtaken forever. The texts of one request may be
    spread over several batches. At most `queue_tokens` wait, so the wait is bounded; beyond that, `QueueFull` is
    raised. If a request is cancelled, its texts are dropped.

    Args:
        score: computes logits from token ids.
        batch_tokens: tokens per batch. A batch is shorter if it would take longer than `BATCH_SECONDS`.
        queue_tokens: tokens that may be tokenised, wait or be scored at a time.
        max_wait: longest wait for other texts, in seconds.
        metrics: receives the queue's length and the batches.
    """

    def __init__(
        self, score: ScoreTexts, *, batch_tokens: int, queue_tokens: int, max_wait: float, metrics: ServerMetrics
    ) -> None:
        self._score, self._metrics = score, metrics
        self._batch_tokens, self._queue_tokens, self._max_wait = batch_tokens, queue_tokens, max_wait
        self._requests: set[_Request] = set()
        self._order: list[
            tuple[float, int, _Request]
        ] = []  # a heap by the time of the end; some may have no texts left
        self._count = 0  # of requests so far; decides between equal times
        self._speed = 0.0  # tokens per second, a moving average
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "score")
        self._task: asyncio.Task[None] | None = None
        self._fault = ""

    def start(self) -> None:
        """Start scoring in the running event loop."""
        self._task = asyncio.create_task(self._run())

    @property
    def problem(self) -> str:
        """Why no text can be scored until the process is started again; empty if texts can be scored."""
        stopped = self._task is None or self._task.done()
        return self._fault or ("the scoring thread has ended" if stopped else "")

    async def stop(self) -> None:
        """Score the waiting texts, then stop."""
        while self._requests and not self.problem:
            await asyncio.sleep(0.01)
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown()

    async def logits(self, texts: Sequence[list[int]]) -> list[Logits]:
        """The logits of each text.

        Raises:
            QueueFull, CannotScore: see `admit`.
        """
        with self.admit(sum(map(len, texts))) as score:
            return await score(texts)

    @contextmanager
    def admit(self, tokens: int) -> Iterator[Callable[[Sequence[list[int]]], Awaitable[list[Logits]]]]:
        """Count a request in the queue until the block ends, from before its texts are tokenised.

        A request counts for no more than `MOST_OF_QUEUE`. If the queue is empty, a request of any size is admitted.

        Args:
            tokens: an estimate of the request's tokens.

        Yields:
            A function that gives the logits of the request's texts. Call it once.

        Raises:
            QueueFull: too many tokens are waiting.
            CannotScore: the batcher has stopped, or its device does not work.
        """
        if self.problem:
            raise CannotScore(f"{self.problem}; start the server again")
        if self._requests and sum(map(self._share, self._requests)) + self._most(tokens) > self._queue_tokens:
            raise QueueFull(self._seconds_left())
        request = _Request(tokens)
        self._requests.add(request)
        self._report()
        try:
            yield lambda texts: self._logits(request, texts)
        finally:
            self._requests.discard(request)
            request.waiting.clear()
            self._report()

    async def _logits(self, request: _Request, texts: Sequence[list[int]]) -> list[Logits]:
        loop = asyncio.get_running_loop()
        request.waiting = deque(_PendingText(ids, loop.create_future()) for ids in texts)
        request.tokens, request.arrived = sum(map(len, texts)), time.monotonic()
        self._report()
        done = [text.done for text in request.waiting]
        self._count += 1
        heappush(self._order, (request.arrived + request.tokens / (self._speed or FIRST_SPEED), self._count, request))
        self._arrival.set()
        return list(await asyncio.gather(*done))

    def _share(self, request: _Request) -> int:
        return self._most(request.tokens)

    def _most(self, tokens: int) -> int:
        return min(tokens, math.ceil(MOST_OF_QUEUE * self._queue_tokens))

    def _seconds_left(self) -> int:
        """Estimated seconds until the queue is empty, from 1 to 60."""
        tokens = sum(request.tokens for request in self._requests)
        return max(1, min(60, math.ceil(tokens / self._speed))) if self._speed else 1

    def _report(self) -> None:
        self._metrics.queued(sum(request.tokens for request in self._requests))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_for_batch()
            batch = self._next_batch()
            if not batch:
                continue
            began = time.monotonic()
            texts = [text.ids for _, text in batch]
            results = await loop.run_in_executor(self._thread, self._score_or_fail, texts)
            self._finish(batch, began, results)

    def _score_or_fail(self, texts: Sequence[list[int]]) -> Sequence[Logits | Exception]:
        """The logits or the error of each text. If a batch fails, its texts are tried one by one."""
        if self._fault:
            return [CannotScore(self._fault)] * len(texts)
        try:
            return self._score(texts)
        except Exception as error:
            if is_device_fault(error):
                self._fault = f"the device does not work ({str(error).strip().splitlines()[0]})"
                return [CannotScore(self._fault)] * len(texts)
            return [error] if len(texts) == 1 else [self._score_or_fail([text])[0] for text in texts]

    async def _wait_for_batch(self) -> None:
        """Wait until a batch is full, or the first request has waited long enough."""
        while (first := self._first()) is None:
            self._arrival.clear()
            await self._arrival.wait()
        deadline = first.arrived + self._max_wait
        while self._waiting_tokens() < self._batch_limit():
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), deadline - time.monotonic())
            except TimeoutError:
                return

    def _first(self) -> _Request | None:
        """The request whose texts come next; None if no text waits."""
        while self._order and not self._order[0][2].waiting:
            heappop(self._order)
        return self._order[0][2] if self._order else None

    def _waiting_tokens(self) -> int:
        return sum(len(text.ids) for _, _, request in self._order for text in request.waiting)

    def _batch_limit(self) -> int:
        tokens = self._speed * BATCH_SECONDS if self._speed else FIRST_BATCH_TOKENS
        return max(1, min(self._batch_tokens, int(tokens)))

    def _next_batch(self) -> list[tuple[_Request, _PendingText]]:
        """As many waiting texts as fit, at least one; none if all clients have left."""
        batch: list[tuple[_Request, _PendingText]] = []
        tokens, limit = 0, self._batch_limit()
        while (request := self._first()) and (not batch or tokens + len(request.waiting[0].ids) <= limit):
            text = request.waiting.popleft()
            batch.append((request, text))
            tokens += len(text.ids)
        return batch

    def _finish(
        self, batch: Sequence[tuple[_Request, _PendingText]], began: float, results: Sequence[Logits | Exception]
    ) -> None:
        tokens, seconds = sum(len(text.ids) for _, text in batch), time.monotonic() - began
        for (request, text), result in zip(batch, results, strict=True):
            request.tokens -= len(text.ids)
            if text.done.done():  # its client has left
                continue
            if isinstance(result, Exception):
                text.done.set_exception(result)
            else:
                text.done.set_result(result)
        self._report()
        if not any(isinstance(result, Exception) for result in results):
            speed = tokens / max(seconds, 1e-9)
            self._speed = SPEED_DECAY * self._speed + (1 - SPEED_DECAY) * speed if self._speed else speed
            self._metrics.scored(len(batch), tokens, seconds)


def is_device_fault(error: Exception) -> bool:
    """Whether an error of a device lasts until the process ends: every later call fails too. Out of memory does not."""
    text = str(error)
    is_fault = type(error).__name__ == "AcceleratorError" or any(name in text for name in _DEVICE_FAULTS)
    return is_fault and "out of memory" not in text
