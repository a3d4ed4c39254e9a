"""Collect a step's experience: generate, score and evaluate, all three at the same time.

requests ─> EnginePool.generate ─ samples of full prompts, in chunks ──┬─> RewardPool.submit ───────────┬─> Experience
                                                                       └─> LearnerGroup.begin_evaluate ─┘
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Batch, Ending, Request, Rollout, Row, Sample, Sampling
from metaalign_rl.learner.batch import batch_of, concat
from metaalign_rl.learner.group import LearnerGroup, PendingCall
from metaalign_rl.ppo.prompt_sampler import PromptSource
from metaalign_rl.ppo.step_timer import StepTimer
from metaalign_rl.ppo.weight_sync import WeightSync
from metaalign_rl.rollout.engine_pool import EnginePool
from metaalign_rl.rollout.generate_call import NoEngineServing
from metaalign_rl.runtime.faults import StepInterrupted
from metaalign_rl.scoring.worker_pool import PendingScores, RewardPool


class Experience(NamedTuple):
    """The data that one step learns from.

    Attributes:
        rollouts: in the order of the step's requests.
        batch: their tokens, evaluated by policy, reference and critic; row i is rollout i.
        seconds: time by part.
    """

    rollouts: list[Rollout]
    batch: Batch
    seconds: dict[str, float]


class RolloutChunk(NamedTuple):
    """Samples that are scored and evaluated while others are still generated."""

    samples: list[Sample]
    scores: PendingScores
    evaluation: PendingCall | None


class Collector:
    """Collects the experience of a step.

    Args:
        prompts: gives each step's rows and prompts.
        pad_id: padding token of the batches.
    """

    def __init__(
        self,
        config: Config,
        prompts: PromptSource,
        engines: EnginePool,
        scorers: RewardPool,
        learners: LearnerGroup,
        weight_sync: WeightSync,
        pad_id: int,
    ) -> None:
        self._config, self._prompts, self._pad_id = config, prompts, pad_id
        self._engines, self._scorers, self._learners, self._weight_sync = engines, scorers, learners, weight_sync
        self._sampling = config.rollout.sampling

    def collect(self, step: int) -> Experience:
        """The experience of `ppo.samples_per_prompt` responses to each of the step's prompts.

        With `ppo.deterministic`, a step that loses an engine is repeated.

        Raises:
            UserError: a row cannot be scored.
            GenerationCancelled, LearnersLost, StaleEngine, TooManyFaults.
        """
        while True:
            try:
                return self._collect(step)
            except StepInterrupted:
                self._weight_sync.repair()

    def _collect(self, step: int) -> Experience:
        timer, copies = StepTimer(), self._config.ppo.samples_per_prompt
        rows, prompts = self._prompts.draw(step)
        row_of = [row for row in rows for _ in range(copies)]  # by request index
        with timer.part("rollout"):
            requests = [
                Request(index, ids, self._seed(step, index))
                for index, ids in enumerate(ids for ids in prompts for _ in range(copies))
            ]
            chunks = [self._send_on(row_of, samples) for samples in self._chunks(requests)]
        with timer.part("reward"):
            rewards = [reward for chunk in chunks for reward in self._scorers.result(chunk.scores)]
        with timer.part("reference"):
            batch = concat(self._evaluated(chunks))
        samples = [sample for chunk in chunks for sample in chunk.samples]
        order = sorted(range(len(samples)), key=lambda place: samples[place].index)
        rollouts = [Rollout(row_of[samples[place].index], samples[place], rewards[place]) for place in order]
        return Experience(rollouts, batch.select(order), timer.seconds)

    def _seed(self, step: int, index: int) -> int | None:
        """With `ppo.deterministic`, a seed per request: without it, a response depends on all earlier sampling."""
        if not self._config.ppo.deterministic:
            return None
        return random.Random(f"{self._config.run.seed} {step} {index}").getrandbits(31)

    def _chunks(self, requests: list[Request]) -> Iterator[list[Sample]]:
        ppo = self._config.ppo
        self._scorers.begin_step()
        groups = complete_groups(self.generate(requests, self._sampling), ppo.samples_per_prompt)
        if ppo.deterministic:  # a chunk must not depend on which response finished first
            groups = in_order(groups, ppo.samples_per_prompt)
        return chunked(groups, max(ppo.samples_per_prompt, len(requests) // ppo.stream_chunks))

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        """Samples as they finish. If all engines are lost, their replacements answer the rest.

        Raises:
            StepInterrupted, GenerationCancelled, LearnersLost, StaleEngine, TooManyFaults.
        """
        while requests:
            try:
                yield from self._engines.generate(requests, sampling)
                return
            except NoEngineServing as lost:
                requests = lost.unanswered
                self._weight_sync.repair()

    def rest(self) -> None:
        """Free the memory of devices that the engines share with the learners. The engines keep their weights."""
        if self._config.shares_devices:
            self._engines.sleep(keep_weights=True)

    def _send_on(self, row_of: Sequence[Row], samples: list[Sample]) -> RolloutChunk:
        scores = submit(self._scorers, [row_of[sample.index] for sample in samples], samples)
        return RolloutChunk(samples, scores, None if self._config.shares_devices else self._evaluate(samples))

    def _evaluate(self, samples: list[Sample]) -> PendingCall:
        return self._learners.begin_evaluate(batch_of(samples, self._pad_id))

    def _evaluated(self, chunks: Sequence[RolloutChunk]) -> list[Batch]:
        """The chunks' batches. Engines that share devices with the learners sleep before the learners work."""
        if self._config.shares_devices:
            self._engines.sleep()
        calls = [chunk.evaluation or self._evaluate(chunk.samples) for chunk in chunks]
        return [self._learners.result(call) for call in calls]


def submit(scorers: RewardPool, rows: Sequence[Row], samples: Sequence[Sample]) -> PendingScores:
    """Have the reward workers score samples that answer rows."""
    endings = [Ending(sample.finished, len(sample.response_ids)) for sample in samples]
    return scorers.submit(rows, [sample.text for sample in samples], endings)


def complete_groups(finished: Iterable[list[Sample]], copies: int) -> Iterator[list[list[Sample]]]:
    """Per arrival, the prompts whose `copies` samples have all finished; each prompt's samples by index."""
    groups: dict[int, list[Sample]] = {}
    for arrival in finished:
        for sample in arrival:
            groups.setdefault(sample.index // copies, []).append(sample)
        complete = [number for number, group in groups.items() if len(group) == copies]
        yield [sorted(groups.pop(number), key=lambda sample: sample.index) for number in complete]
    assert not groups, "a sample is missing"


def in_order(arrivals: Iterable[list[list[Sample]]], copies: int) -> Iterator[list[list[Sample]]]:
    """One group at a time, by index; a group that finishes early waits for the ones before it."""
    waiting: dict[int, list[Sample]] = {}
    following = 0
    for group in chain.from_iterable(arrivals):
        waiting[group[0].index // copies] = group
        while following in waiting:
            yield [waiting.pop(following)]
            following += 1


def chunked(arrivals: Iterable[list[list[Sample]]], size: int) -> Iterator[list[Sample]]:
    """The groups' samples in chunks of at least `size`; samples that arrive together stay together."""
    chunk: list[Sample] = []
    for groups in arrivals:
        chunk += chain.from_iterable(groups)
        if len(chunk) >= size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
