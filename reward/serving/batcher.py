"""Texts of concurrent requests, scored together."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from reward.serving.metrics import Metrics

Logits = list[float]
ScoreTexts = Callable[[Sequence[list[int]]], list[Logits]]
RECENT = 0.8  # weight of what was known of the speed, beside a new batch


class Busy(Exception):
    """Too much waits already; ask again after `seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


@dataclass(slots=True)
class _Text:
    ids: list[int]
    arrived: float
    done: "asyncio.Future[Logits]" = field(repr=False)


class Batcher:
    """Collects texts until a batch is full or its first text has waited `max_wait`, then scores them in one thread.

    A text waits for others for `max_wait` seconds at most, and for the texts before it: at most `queue_tokens`, beyond
    which `Busy` is raised instead. Texts are scored in the order in which they came; those of one request may go into
    several batches.

    Args:
        score: from token ids to logits.
        batch_tokens: tokens of a batch. queue_tokens: tokens that may wait or be under way.
        max_wait: seconds.
    """

    def __init__(
        self, score: ScoreTexts, *, batch_tokens: int, queue_tokens: int, max_wait: float, metrics: Metrics
    ) -> None:
        self._score, self._metrics = score, metrics
        self._batch_tokens, self._queue_tokens, self._max_wait = batch_tokens, queue_tokens, max_wait
        self._waiting: deque[_Text] = deque()
        self._tokens = 0  # waiting or under way
        self._rate = 0.0  # tokens a second, of late
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "score")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to score, in the running event loop."""
        self._task = asyncio.create_task(self._run())

    @property
    def alive(self) -> bool:
        """Whether texts are scored."""
        return self._task is not None and not self._task.done()

    async def stop(self) -> None:
        """Score what waits, then end."""
        while self._tokens and self.alive:
            await asyncio.sleep(0.01)
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown()

    async def logits(self, texts: Sequence[list[int]]) -> list[Logits]:
        """The logits of each text.

        Raises:
            Busy: too many tokens wait already.
        """
        if not self.alive:
            raise RuntimeError("the batcher has ended; start the server again")
        tokens = sum(map(len, texts))
        if self._tokens and self._tokens + tokens > self._queue_tokens:
            raise Busy(self._seconds_left())
        self._count(tokens)
        loop, now = asyncio.get_running_loop(), time.monotonic()
        added = [_Text(ids, now, loop.create_future()) for ids in texts]
        self._waiting.extend(added)
        self._arrival.set()
        return list(await asyncio.gather(*(text.done for text in added)))

    def _seconds_left(self) -> int:
        return max(1, min(60, math.ceil(self._tokens / self._rate))) if self._rate else 1

    def _count(self, tokens: int) -> None:
        self._tokens += tokens
        self._metrics.queued(self._tokens)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_for_a_batch()
            batch = self._take()
            if not batch:
                continue
            began = time.monotonic()
            found = await loop.run_in_executor(self._thread, self._try, [text.ids for text in batch])
            self._finish(batch, began, found)

    def _try(self, texts: Sequence[list[int]]) -> Sequence[Logits | Exception]:
        """The logits of each text, or its fault: one text's must not become that of others in its batch."""
        try:
            return self._score(texts)
        except Exception as error:
            return [error] if len(texts) == 1 else [found for text in texts for found in self._try([text])]

    async def _wait_for_a_batch(self) -> None:
        while not self._waiting:
            self._arrival.clear()
            await self._arrival.wait()
        until = self._waiting[0].arrived + self._max_wait
        while sum(len(text.ids) for text in self._waiting) < self._batch_tokens:
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), until - time.monotonic())
            except TimeoutError:
                return

    def _take(self) -> list[_Text]:
        """The texts of the next batch: as many as fit, one at least; none where all who wait have gone."""
        batch: list[_Text] = []
        tokens = 0
        while self._waiting and (not batch or tokens + len(self._waiting[0].ids) <= self._batch_tokens):
            text = self._waiting.popleft()
            if text.done.cancelled():  # its client is gone
                self._count(-len(text.ids))
            else:
                batch.append(text)
                tokens += len(text.ids)
        return batch

    def _finish(self, batch: Sequence[_Text], began: float, found: Sequence[Logits | Exception]) -> None:
        tokens, seconds = sum(len(text.ids) for text in batch), time.monotonic() - began
        self._count(-tokens)
        for text, result in zip(batch, found, strict=True):
            if text.done.cancelled():
                continue
            if isinstance(result, Exception):
                text.done.set_exception(result)
            else:
                text.done.set_result(result)
        if not any(isinstance(result, Exception) for result in found):
            rate = tokens / max(seconds, 1e-9)
            self._rate = RECENT * self._rate + (1 - RECENT) * rate if self._rate else rate
            self._metrics.scored(len(batch), tokens, seconds)
