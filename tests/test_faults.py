"""Actors that die or hang in the middle of their work: real processes are killed, the work is done all the same.

The actors here are as small as can be, so that a test takes a second; `test_resume.py` kills those of a real run.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from metaalign_rl.core.dataflow import Request, Reward, Sample, Sampling
from metaalign_rl.core.errors import UserError
from metaalign_rl.data.world import build
from metaalign_rl.rollout.engine_pool import EnginePool
from metaalign_rl.rollout.generate_call import NoEngineServing
from metaalign_rl.runtime.actor_calls import HeartbeatDeadline, follow
from metaalign_rl.runtime.faults import (
    ActorLost,
    EngineLost,
    FaultLog,
    GenerationCancelled,
    LearnersLost,
    StepInterrupted,
    TooManyFaults,
)
from metaalign_rl.scoring.worker_pool import RewardPool

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
REQUESTS = [Request(index, [1, 2]) for index in range(12)]


class Engine:
    """Answers one request every 50 ms, with the version that it was given; the request `hangs` never.

    While it has hung, it does not do what it is told either.
    """

    def __init__(self, number, hangs=None):
        self.number, self.hangs, self.version, self.hung = number, hangs, 0, False

    def ready(self):
        return os.getpid()

    def take(self, version):
        self.version = version

    def abort(self):
        while self.hung:
            time.sleep(60)

    def generate(self, requests, sampling):
        for request in requests:
            while request.index == self.hangs:
                self.hung = True
                time.sleep(60)
            time.sleep(0.05)
            answer = replace(SAMPLE, index=request.index, weight_version=self.version, engine=self.number)
            yield [answer]


SAMPLE = Sample(0, [1, 2], [3], [-1.0], "x", finished=True, weight_version=0)


class Worker:
    """Every answer is worth its length."""

    def pid(self):
        return os.getpid()

    def score(self, rows, answers):
        time.sleep(0.1)
        return [Reward(float(len(answer)), None, None) for answer in answers]


class Broken(Worker):
    """Dies of every call."""

    def score(self, rows, answers):
        os._exit(1)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    ray.shutdown()


@pytest.fixture
def faults(tmp_path: Path) -> FaultLog:
    return FaultLog(tmp_path / "faults.jsonl", limit=3, say=lambda line: None)


def kill(actor) -> None:
    """What the kernel does to a process that has used too much memory."""
    os.kill(ray.get(actor.ready.remote()), signal.SIGKILL)


def engine_pool(faults, count, silence=30.0, hangs=None, **options) -> EnginePool:
    started = Counter()

    def start(number):
        started[number] += 1
        is_first = (number, started[number]) == (1, 1)
        return ray.remote(num_cpus=0, max_concurrency=2)(Engine).remote(number, hangs if is_first else None)

    pool = EnginePool(start, count, faults, lambda: HeartbeatDeadline(30.0, silence), **options)
    push_version(pool, 7)
    return pool


def push_version(pool, version) -> None:
    """Give all engines new weights, as `WeightSync.push` does."""
    is_done = False
    while not is_done:
        with pool.actors.updating() as engines:
            ray.get([engine.take.remote(version) for engine in engines.values()])
        is_done = pool.actors.all_serve


def answered(pool, on_first=lambda: None) -> list[Sample]:
    """All samples; `on_first` is called once one has arrived."""
    samples, requests = [], REQUESTS
    while requests:
        try:
            for finished in pool.generate(requests, Sampling()):
                if not samples:
                    on_first()
                samples += finished
            requests = []
        except NoEngineServing as lost:
            requests = lost.unanswered
            push_version(pool, 7)
    return samples


def lines(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]


def test_idle_actors_are_not_taken_for_hung(faults, tmp_path):
    """Engines wait for learners, and reward workers for a step's first answers, as long as it takes."""
    pool = engine_pool(faults, 2, silence=1.0)
    start = lambda number: ray.remote(num_cpus=0)(Worker).remote()  # noqa: E731
    scorers = RewardPool(start, 1, faults, lambda: HeartbeatDeadline(30.0, 1.0))
    scorers.result(scorers.submit(build.prompts(0, 1), ["x"]))
    scorers.begin_step()
    time.sleep(1.5)
    push_version(pool, 8)
    scorers.result(scorers.submit(build.prompts(0, 1), ["x"]))
    assert not (tmp_path / "faults.jsonl").exists()


def test_an_abandoned_round_ends_though_its_engine_hangs(faults):
    pool = engine_pool(faults, 2, silence=4.0, hangs=8)
    with ThreadPoolExecutor(1) as thread:
        round_ = thread.submit(answered, pool)
        time.sleep(1)
        with pool.cancelling(), pytest.raises(GenerationCancelled):
            round_.result(timeout=20)
    assert faults.count == 0


def test_a_step_is_interrupted_though_another_engine_hangs(faults):
    pool = engine_pool(faults, 2, silence=3.0, hangs=6, whole_steps=True)
    began = time.monotonic()
    with pytest.raises(StepInterrupted, match="rollout engine 0"):
        answered(pool, on_first=lambda: kill(pool.actors.actors[0]))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_killed_engine_had_not_answered_is_answered_once_and_from_the_present_weights(faults, tmp_path, count):
    pool = engine_pool(faults, count)
    samples = answered(pool, on_first=lambda: kill(pool.actors.actors[0]))
    assert sorted(sample.index for sample in samples) == list(range(12))
    assert {sample.weight_version for sample in samples} == {7}
    assert [(line["who"], line["what"]) for line in lines(tmp_path)] == [("rollout engine 0", "died")]


def test_the_engine_in_its_place_serves_from_the_next_weights_on(faults):
    pool = engine_pool(faults, 2)
    samples = answered(pool, on_first=lambda: kill(pool.actors.actors[0]))
    assert {sample.engine for sample in samples[-3:]} == {1}
    push_version(pool, 8)
    assert {(sample.engine, sample.weight_version) for sample in answered(pool)} == {(0, 8), (1, 8)}


def test_an_engine_that_says_nothing_is_taken_for_hung(faults, tmp_path):
    samples = answered(engine_pool(faults, 2, silence=3.0, hangs=8))
    assert sorted(sample.index for sample in samples) == list(range(12))
    (line,) = lines(tmp_path)
    assert (line["who"], line["what"]) == ("rollout engine 1", "hung")
    assert "no sign of life" in line["cause"]


def test_an_engine_killed_while_it_takes_weights_is_replaced(faults, tmp_path):
    pool = engine_pool(faults, 2)
    with pool.actors.updating() as engines:
        kill(engines[1])
        raise EngineLost(1, RuntimeError("gone"))
    assert sorted(pool.actors.serving) == [0]
    push_version(pool, 9)
    assert {(sample.engine, sample.weight_version) for sample in answered(pool)} == {(0, 9), (1, 9)}


def test_where_steps_must_be_whole_the_step_is_interrupted_and_can_be_done_again(faults):
    pool = engine_pool(faults, 2, whole_steps=True)
    with pytest.raises(StepInterrupted, match="rollout engine 0"):
        answered(pool, on_first=lambda: kill(pool.actors.actors[0]))
    push_version(pool, 7)
    assert sorted(sample.index for sample in answered(pool)) == list(range(12))


def test_a_killed_reward_workers_answers_are_scored_again(faults, tmp_path):
    rows = build.prompts(0, 4)
    workers = {}

    def start(number):
        workers[number] = ray.remote(num_cpus=0, max_concurrency=2)(Worker).remote()
        return workers[number]

    pool = RewardPool(start, 2, faults, lambda: HeartbeatDeadline(30.0, 30.0))
    tickets = [pool.submit(rows, [f"{'x' * part}"] * 4) for part in range(6)]
    os.kill(ray.get(workers[1].pid.remote()), signal.SIGKILL)
    tickets += [pool.submit(rows, ["xxxxxx"] * 4)]
    assert [pool.result(ticket)[0].value for ticket in tickets] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["who"] for line in lines(tmp_path)] == ["reward worker 1"]


def test_what_breaks_again_and_again_ends_the_run_with_its_root_cause(faults):
    pool = RewardPool(
        lambda number: ray.remote(num_cpus=0)(Broken).remote(), 1, faults, lambda: HeartbeatDeadline(30.0, 30.0)
    )
    with pytest.raises(TooManyFaults, match=r"4 faults of reward worker 0 without .* 0 died: .*actor"):
        pool.result(pool.submit(build.prompts(0, 1), ["x"]))


def test_an_actor_that_cannot_be_made_is_an_error_and_no_fault(faults, tmp_path):
    class Wrong(Worker):
        def __init__(self):
            raise UserError("reward.path: no such folder")

    pool = RewardPool(
        lambda number: ray.remote(num_cpus=0)(Wrong).remote(), 1, faults, lambda: HeartbeatDeadline(30.0, 30.0)
    )
    with pytest.raises(Exception, match="no such folder"):
        pool.result(pool.submit(build.prompts(0, 1), ["x"]))
    assert not (tmp_path / "faults.jsonl").exists()


def test_a_rank_that_fails_is_heard_though_the_others_wait_for_it():
    class Rank:
        def train(self, rank):
            yield rank
            if rank == 1:
                raise UserError("demonstrations.jsonl: no such file")
            time.sleep(60)

    ranks = [ray.remote(num_cpus=0)(Rank).remote() for _ in range(2)]
    streams = [rank.train.options(num_returns="streaming").remote(number) for number, rank in enumerate(ranks)]
    with pytest.raises(UserError, match="no such file"):
        list(follow(streams))


def test_many_actors_may_be_lost_at_once_as_with_their_node(faults):
    for number in range(16):
        faults.record(EngineLost(number, RuntimeError("gone")), "another one takes its place")
    assert faults.count == 16


def test_learners_that_die_at_one_step_end_the_run_though_steps_before_it_are_done_again(faults):
    lost = [LearnersLost(f"learner rank {rank}", RuntimeError("gone")) for rank in range(4)]
    for one in lost[:3]:
        faults.progress(1)
        faults.progress(2)
        faults.record(one, "all ranks start again")
    faults.progress(1)
    with pytest.raises(TooManyFaults, match="4 faults of the learners"):
        faults.record(lost[3], "all ranks start again")


def test_a_finished_step_forgets_the_faults_before_it_but_they_stay_counted(faults, tmp_path):
    for step in range(5):
        for _ in range(3):
            faults.record(ActorLost("reward worker 0", RuntimeError("gone")), "another one takes its place")
        faults.progress(step + 1)
    assert faults.count == faults.of_reward == len(lines(tmp_path)) == 15
    assert FaultLog(tmp_path / "faults.jsonl", limit=3).count == 15
    assert FaultLog(tmp_path / "faults.jsonl", limit=3).of_reward == 15


def test_what_a_kill_left_of_a_fault_s_line_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    lost = ActorLost("reward worker 0", TimeoutError("silent"))
    FaultLog(path, limit=5, say=lambda line: None).record(lost, "replaced")
    path.write_text(path.read_text() + '{"time": "20')
    log = FaultLog(path, limit=5, say=lambda line: None)
    assert log.count == 1
    log.record(lost, "replaced")
    assert [json.loads(line)["who"] for line in path.read_text().splitlines()] == [lost.who] * 2
