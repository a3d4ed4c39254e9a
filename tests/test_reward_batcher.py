"""The batcher of the scoring server: batches, the order of requests, and the limit of its queue."""

import asyncio
import time
from typing import Any

import pytest

from reward.serving.batcher import Batcher, QueueFull
from reward.serving.server_metrics import PrometheusMetrics


class SlowScore:
    """A slow score function: the length of each text. It records the batches."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[list[int]]] = []
        self._seconds = seconds

    def __call__(self, texts: Any) -> list[list[float]]:
        self.batches.append(list(texts))
        time.sleep(self._seconds)
        return [[float(len(text))] for text in texts]


async def batch_logits(score: Any, requests: list[list[list[int]]], **settings: Any) -> list[Any]:
    """The results of a batcher for concurrent requests, with errors as values."""
    limits = {"batch_tokens": 100, "queue_tokens": 10_000, "max_wait": 0.05, **settings}
    batcher = Batcher(score, metrics=PrometheusMetrics(), **limits)
    batcher.start()
    found = await asyncio.gather(*map(batcher.logits, requests), return_exceptions=True)
    await batcher.stop()
    return found


def test_concurrent_requests_share_a_batch_and_each_gets_its_own_scores() -> None:
    score = SlowScore()
    found = asyncio.run(batch_logits(score, [[[0] * length] for length in (3, 1, 2)]))
    assert found == [[[3.0]], [[1.0]], [[2.0]]]
    assert len(score.batches) == 1


def test_a_batch_stays_within_the_token_limit() -> None:
    score = SlowScore()
    asyncio.run(batch_logits(score, [[[0] * 40] * 5, [[0] * 400]]))
    assert [sum(map(len, batch)) for batch in score.batches] == [80, 80, 40, 400]


def test_a_single_request_waits_at_most_max_wait() -> None:
    began = time.monotonic()
    asyncio.run(batch_logits(SlowScore(), [[[0]]], max_wait=0.2))
    assert 0.15 < time.monotonic() - began < 10


def test_a_request_that_does_not_fit_the_queue_gets_a_time_to_try_again() -> None:
    *served, refused = asyncio.run(batch_logits(SlowScore(0.05), [[[0] * 60]] * 3, queue_tokens=150))
    assert served == [[[60.0]]] * 2
    assert isinstance(refused, QueueFull)
    assert refused.seconds >= 1


def test_a_request_larger_than_the_queue_is_scored_if_the_queue_is_empty() -> None:
    (found,) = asyncio.run(batch_logits(SlowScore(), [[[0] * 60] * 3], queue_tokens=150))
    assert found == [[60.0]] * 3


def test_a_small_request_does_not_wait_for_a_large_one_that_came_before() -> None:
    score = SlowScore(0.02)

    async def run() -> tuple[int, int]:
        batcher = Batcher(score, metrics=PrometheusMetrics(), batch_tokens=100, queue_tokens=10_000, max_wait=0.001)
        batcher.start()
        large = asyncio.create_task(batcher.logits([[0] * 60] * 50))
        await asyncio.sleep(0.05)
        await batcher.logits([[0]])
        before = len(score.batches)
        await large
        await batcher.stop()
        return before, len(score.batches)

    before, total = asyncio.run(run())
    assert before < 10 < total


def test_a_large_request_is_not_overtaken_forever() -> None:
    async def run() -> bool:
        limits = {"batch_tokens": 10, "queue_tokens": 10_000, "max_wait": 0.0}
        batcher = Batcher(SlowScore(0.01), metrics=PrometheusMetrics(), **limits)  # type: ignore[arg-type]
        batcher.start()
        large = asyncio.create_task(batcher.logits([[0] * 10] * 5))
        waiting = {asyncio.create_task(batcher.logits([[0] * 10])) for _ in range(5)}
        end = time.monotonic() + 5
        while not large.done() and time.monotonic() < end:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            waiting |= {asyncio.create_task(batcher.logits([[0] * 10])) for _ in done}
        await asyncio.gather(*waiting)
        await batcher.stop()
        return large.done()

    assert asyncio.run(run())


def test_batches_are_as_short_as_a_slow_device_needs() -> None:
    class Steady(SlowScore):
        def __call__(self, texts: Any) -> list[list[float]]:
            time.sleep(sum(map(len, texts)) / 1000)  # 1,000 tokens per second
            return super().__call__(texts)

    score = Steady()
    asyncio.run(batch_logits(score, [[[0] * 50] * 40], batch_tokens=2000))
    sizes = [sum(map(len, batch)) for batch in score.batches]
    assert sizes[0] <= 1024
    assert max(sizes[1:]) <= 550


def test_a_request_counts_in_the_queue_while_it_is_tokenised() -> None:
    async def run() -> list[bool]:
        batcher = Batcher(SlowScore(), metrics=PrometheusMetrics(), batch_tokens=100, queue_tokens=100, max_wait=0.0)
        batcher.start()
        with batcher.admit(90) as score:
            with pytest.raises(QueueFull):
                await batcher.logits([[0] * 30])
            small = await batcher.logits([[0]])  # one request never fills the queue
            large = await score([[0] * 90])
        after = await batcher.logits([[0] * 90])
        await batcher.stop()
        return [bool(found) for found in (small, large, after)]

    assert asyncio.run(run()) == [True, True, True]


def test_a_cancelled_request_leaves_the_queue_and_is_not_scored() -> None:
    score = SlowScore(0.05)

    async def run() -> float:
        metrics = PrometheusMetrics()
        batcher = Batcher(score, metrics=metrics, batch_tokens=10, queue_tokens=1000, max_wait=0.0)
        batcher.start()
        request = asyncio.create_task(batcher.logits([[0] * 10] * 50))
        await asyncio.sleep(0.08)
        request.cancel()
        await asyncio.wait({request})
        queued = metrics.registry.get_sample_value("metaalign_reward_queue_tokens")
        assert queued is not None
        await batcher.logits([[1]])
        await batcher.stop()
        return queued

    assert asyncio.run(run()) == 0
    assert len(score.batches) < 5


def test_a_text_that_fails_does_not_fail_other_requests() -> None:
    def score(texts: Any) -> list[list[float]]:
        if any(len(text) == 1 for text in texts):
            raise RuntimeError("broken")
        return [[0.0]] * len(texts)

    bad, good = asyncio.run(batch_logits(score, [[[0]], [[0] * 9]]))  # one batch
    assert isinstance(bad, RuntimeError)
    assert good == [[0.0]]
