"""The batcher: scores the texts of concurrent requests together."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from reward.serving.server_metrics import ServerMetrics

Logits = list[float]
ScoreTexts = Callable[[Sequence[list[int]]], list[Logits]]
SPEED_DECAY = 0.8  # weight of the earlier batches in the moving average of the speed


class QueueFull(Exception):
    """Too many tokens are waiting; the client should try again after `seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


@dataclass(slots=True)
class _PendingText:
    ids: list[int]
    arrived: float
    done: "asyncio.Future[Logits]" = field(repr=False)


class Batcher:
    """Collects texts until a batch is full or its first text has waited `max_wait`, then scores them in one thread.

    Texts are scored in the order of their arrival. The texts of one request may be spread over several batches. At most
    `queue_tokens` wait, so the wait is bounded; beyond that, `QueueFull` is raised.

    Args:
        score: computes logits from token ids.
        batch_tokens: tokens per batch.
        queue_tokens: tokens that may wait or be scored at a time.
        max_wait: longest wait for other texts, in seconds.
        metrics: receives the queue's length and the batches.
    """

    def __init__(
        self, score: ScoreTexts, *, batch_tokens: int, queue_tokens: int, max_wait: float, metrics: ServerMetrics
    ) -> None:
        self._score, self._metrics = score, metrics
        self._batch_tokens, self._queue_tokens, self._max_wait = batch_tokens, queue_tokens, max_wait
        self._waiting: deque[_PendingText] = deque()
        self._tokens = 0  # waiting or being scored
        self._speed = 0.0  # tokens per second, a moving average
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "score")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start scoring in the running event loop."""
        self._task = asyncio.create_task(self._run())

    @property
    def alive(self) -> bool:
        """Whether texts are being scored as they arrive."""
        return self._task is not None and not self._task.done()

    async def stop(self) -> None:
        """Score the waiting texts, then stop."""
        while self._tokens and self.alive:
            await asyncio.sleep(0.01)
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown()

    async def logits(self, texts: Sequence[list[int]]) -> list[Logits]:
        """The logits of each text.

        Raises:
            QueueFull: too many tokens are waiting.
            RuntimeError: the batcher has stopped.
        """
        if not self.alive:
            raise RuntimeError("the batcher has stopped; start the server again")
        tokens = sum(map(len, texts))
        if self._tokens and self._tokens + tokens > self._queue_tokens:
            raise QueueFull(self._seconds_left())
        self._add_to_count(tokens)
        loop, now = asyncio.get_running_loop(), time.monotonic()
        added = [_PendingText(ids, now, loop.create_future()) for ids in texts]
        self._waiting.extend(added)
        self._arrival.set()
        return list(await asyncio.gather(*(text.done for text in added)))

    def _seconds_left(self) -> int:
        """Estimated seconds until the queue is empty, from 1 to 60."""
        return max(1, min(60, math.ceil(self._tokens / self._speed))) if self._speed else 1

    def _add_to_count(self, tokens: int) -> None:
        self._tokens += tokens
        self._metrics.queued(self._tokens)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_for_batch()
            batch = self._next_batch()
            if not batch:
                continue
            began = time.monotonic()
            results = await loop.run_in_executor(self._thread, self._score_or_fail, [text.ids for text in batch])
            self._finish(batch, began, results)

    def _score_or_fail(self, texts: Sequence[list[int]]) -> Sequence[Logits | Exception]:
        """The logits or the error of each text. If a batch fails, its texts are tried one by one."""
        try:
            return self._score(texts)
        except Exception as error:
            return [error] if len(texts) == 1 else [self._score_or_fail([text])[0] for text in texts]

    async def _wait_for_batch(self) -> None:
        """Wait until a batch is full, or its first text has waited long enough."""
        while not self._waiting:
            self._arrival.clear()
            await self._arrival.wait()
        deadline = self._waiting[0].arrived + self._max_wait
        while sum(len(text.ids) for text in self._waiting) < self._batch_tokens:
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), deadline - time.monotonic())
            except TimeoutError:
                return

    def _next_batch(self) -> list[_PendingText]:
        """As many waiting texts as fit, at least one. Empty if the clients of all waiting texts have left."""
        batch: list[_PendingText] = []
        tokens = 0
        while self._waiting and (not batch or tokens + len(self._waiting[0].ids) <= self._batch_tokens):
            text = self._waiting.popleft()
            if text.done.cancelled():  # its client has left
                self._add_to_count(-len(text.ids))
            else:
                batch.append(text)
                tokens += len(text.ids)
        return batch

    def _finish(self, batch: Sequence[_PendingText], began: float, results: Sequence[Logits | Exception]) -> None:
        tokens, seconds = sum(len(text.ids) for text in batch), time.monotonic() - began
        self._add_to_count(-tokens)
        for text, result in zip(batch, results, strict=True):
            if text.done.cancelled():
                continue
            if isinstance(result, Exception):
                text.done.set_exception(result)
            else:
                text.done.set_result(result)
        if not any(isinstance(result, Exception) for result in results):
            speed = tokens / max(seconds, 1e-9)
            self._speed = SPEED_DECAY * self._speed + (1 - SPEED_DECAY) * speed if self._speed else speed
            self._metrics.scored(len(batch), tokens, seconds)
