"""From rows to experience: roll out, score while others still roll out."""

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Batch, Request, Rollout, Row, Sample, Sampling
from metaalign_rl.learner.batch import batch_of, concat
from metaalign_rl.learner.group import LearnerGroup, PendingCall
from metaalign_rl.rollout.engine_pool import EnginePool
from metaalign_rl.scoring.worker_pool import PendingScores, RewardPool
from metaalign_rl.weights import StaleEngine, assert_fresh, mismatch


class RolloutChunk(NamedTuple):
    """Samples of a step that are scored, and evaluated, while others still roll out."""

    samples: list[Sample]
    scores: PendingScores
    evaluation: PendingCall | None


class Experience(NamedTuple):
    """A step's rollouts in the order of its requests, the evaluated batch of their tokens, and where the time went."""

    rollouts: list[Rollout]
    batch: Batch
    seconds: dict[str, float]


class Collector:
    """Rolls a step out, and has each part scored and evaluated as soon as it is finished."""

    def __init__(self, config: Config, engines: EnginePool, scorers: RewardPool, learners: LearnerGroup, pad: int):
        self._config, self._engines, self._scorers, self._learners = config, engines, scorers, learners
        self._pad_id = pad
        self._sampling = Sampling(max_new_tokens=config.rollout.max_new_tokens)

    def collect(self, step: int, rows: Sequence[Row], prompts: Sequence[list[int]]) -> Experience:
        """The experience of `ppo.samples_per_prompt` answers to each row; those to one row stand side by side."""
        clock = StepTimer()
        copies = self._config.ppo.samples_per_prompt
        asked = [row for row in rows for _ in range(copies)]
        parts = [self._send_on(asked, samples) for samples in self._parts(self._requests(step, prompts))]
        clock.lap("rollout")
        rewards = [reward for part in parts for reward in self._scorers.result(part.scores)]
        clock.lap("reward")
        batches = self._evaluated(parts)
        clock.lap("reference")
        samples = [sample for part in parts for sample in part.samples]
        order = sorted(range(len(samples)), key=lambda place: samples[place].index)
        rollouts = [Rollout(asked[samples[place].index], samples[place], rewards[place]) for place in order]
        return Experience(rollouts, concat(batches).select(order), clock.laps)

    def _requests(self, step: int, prompts: Sequence[list[int]]) -> list[Request]:
        copies = self._config.ppo.samples_per_prompt
        return [
            Request(index, ids, self._seed(step, index))
            for index, ids in enumerate(ids for ids in prompts for _ in range(copies))
        ]

    def _seed(self, step: int, index: int) -> int | None:
        """In deterministic mode a request's own seed: else answers would depend on all that was drawn before."""
        if not self._config.ppo.deterministic:
            return None
        return random.Random(f"{self._config.run.seed} {step} {index}").getrandbits(31)

    def _parts(self, requests: list[Request]) -> Iterator[list[Sample]]:
        copies, ppo = self._config.ppo.samples_per_prompt, self._config.ppo
        self._scorers.begin_step()
        finished = self._engines.generate(requests, self._sampling)
        groups = whole_groups(finished, copies)
        if ppo.deterministic:  # a part's samples must not depend on who finished first
            groups = in_order(groups, copies)
        return batched(groups, max(copies, len(requests) // ppo.stream_chunks))

    def _send_on(self, asked: Sequence[Row], samples: list[Sample]) -> RolloutChunk:
        rows, answers = [asked[sample.index] for sample in samples], [sample.text for sample in samples]
        scores = self._scorers.submit(rows, answers)
        return RolloutChunk(samples, scores, None if self._config.shares_devices else self._evaluate(samples))

    def _evaluate(self, samples: list[Sample]) -> PendingCall:
        return self._learners.begin_evaluate(batch_of(samples, self._pad_id))

    def _evaluated(self, parts: Sequence[RolloutChunk]) -> list[Batch]:
        """The parts' batches; where engines and learners share devices, the engines sleep before the learners work."""
        if self._config.shares_devices:
            self._engines.sleep()
        calls = [part.evaluation or self._evaluate(part.samples) for part in parts]
        return [self._learners.result(call) for call in calls]


def whole_groups(finished: Iterable[list[Sample]], copies: int) -> Iterator[list[list[Sample]]]:
    """Of each arrival the prompts all of whose `copies` samples are finished now, each prompt's samples by index."""
    groups: dict[int, list[Sample]] = {}
    for arrival in finished:
        for sample in arrival:
            groups.setdefault(sample.index // copies, []).append(sample)
        whole = [number for number, group in groups.items() if len(group) == copies]
        yield [sorted(groups.pop(number), key=lambda sample: sample.index) for number in whole]
    assert not groups, "a sample is missing"


def in_order(arrivals: Iterable[list[list[Sample]]], copies: int) -> Iterator[list[list[Sample]]]:
    """One group at a time, by index; one that is finished early waits for those before it."""
    waiting: dict[int, list[Sample]] = {}
    following = 0
    for group in chain.from_iterable(arrivals):
        waiting[group[0].index // copies] = group
        while following in waiting:
            yield [waiting.pop(following)]
            following += 1


def batched(arrivals: Iterable[list[list[Sample]]], size: int) -> Iterator[list[Sample]]:
    """The groups' samples in parts of at least `size`: what arrives together stays together."""
    part: list[Sample] = []
    for groups in arrivals:
        part += chain.from_iterable(groups)
        if len(part) >= size:
            yield part
            part = []
    if part:
        yield part


class StepTimer:
    """Seconds between laps, as metrics."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `seconds_NAME`."""
        now = time.monotonic()
        self.laps[f"seconds_{name}"] = self.laps.get(f"seconds_{name}", 0.0) + now - self._last
        self._last = now

    def take(self, laps: Mapping[str, float]) -> None:
        """Take over laps that were measured meanwhile; what the time since the last lap holds beyond them stays."""
        self.laps |= laps
        self._last += sum(laps.values())

    def metrics(self) -> dict[str, float]:
        """The laps, and `seconds_step`, their sum."""
        return {**self.laps, "seconds_step": sum(self.laps.values())}


def worst_mismatch(batch: Batch, rollouts: Sequence[Rollout], version: int, limit: float, staleness: int = 0) -> float:
    """The mean |Δ log p| a token between learner and engine, of the engine where it is largest.

    Each engine by itself: in a mean over all of them one stale engine of many would hide. Answers that older weights
    drew, as far as `staleness` allows, may differ by more: there the policy itself has moved.

    Raises:
        StaleEngine: an engine drew from weights of another version, or is above `limit`; names the engine.
    """
    assert batch.rollout_logprobs is not None and batch.logprobs is not None
    rows_of: dict[int, list[int]] = {}
    for row, rollout in enumerate(rollouts):
        rows_of.setdefault(rollout.sample.engine, []).append(row)
    found = []
    for engine, rows in sorted(rows_of.items()):
        name = f"rollout engine {engine}"
        for wrong in sorted({rollouts[row].sample.weight_version for row in rows}):
            if not version - staleness <= wrong <= version:
                raise StaleEngine(
                    f"{name} drew answers from weight version {wrong}, not from the learners' {version}"
                    + (f" or the {staleness} before" if staleness else "")
                )
        found.append(mismatch(batch.rollout_logprobs[rows], batch.logprobs[rows], batch.action_mask[rows]))
        if staleness == 0:
            assert_fresh(found[-1], limit, version, name)
    return max(found)
