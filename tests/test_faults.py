"""Faults: actors that die or hang are replaced, and their work is finished. The tests kill real processes.

The actors here are toys, so that a test takes a second. `test_resume.py` kills the actors of a real run.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from metaalign_rl.config.schema import Config, FaultsConfig
from metaalign_rl.core.dataflow import Request, Reward, Sample, Sampling
from metaalign_rl.core.errors import UserError
from metaalign_rl.data.world import build
from metaalign_rl.learner.group import LearnerGroup
from metaalign_rl.rollout.engine_pool import EnginePool
from metaalign_rl.rollout.generate_call import NoEngineServing
from metaalign_rl.runtime.actor_calls import HeartbeatDeadline, merge_streams
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

pytestmark = pytest.mark.usefixtures("local_ray")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
REQUESTS = [Request(index, [1, 2]) for index in range(12)]


class Engine:
    """Answers one request every 50 ms, with its current weight version.

    It hangs at the request with the index `hangs`. Its other methods then hang, too.
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


class Sleeper(Engine):
    """Notes its calls in a file. The second engine of a number fails to start as often as the file `failures` says."""

    def __init__(self, number, log):
        super().__init__(number)
        self.log = log
        self.note("load")
        failures = log.with_name("failures")
        if failures.is_file() and (left := int(failures.read_text())):
            failures.write_text(str(left - 1))
            raise ValueError("Free memory on device is less than desired")

    def note(self, call):
        with self.log.open("a") as file:
            file.write(f"{call} {self.number}\n")

    def sleep(self, keep_weights=False):
        self.note("sleep")


class Worker:
    """The reward of a response is its length."""

    def pid(self):
        return os.getpid()

    def score(self, rows, answers, endings):
        time.sleep(0.1)
        return [Reward(float(len(answer)), None, None) for answer in answers]


class Broken(Worker):
    """Dies in every call."""

    def score(self, rows, answers, endings):
        os._exit(1)


@pytest.fixture
def faults(tmp_path: Path) -> FaultLog:
    return FaultLog(tmp_path / "faults.jsonl", limit=3, report=lambda line: None)


def kill(actor) -> None:
    """Kill the process as the kernel does if memory runs out."""
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
    """All samples. Calls `on_first` when the first one arrives."""
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


def test_idle_actors_do_not_count_as_hung(faults, tmp_path):
    """Engines may wait for learners, and reward workers for the first responses of a step, for any time."""
    pool = engine_pool(faults, 2, silence=1.0)
    start = lambda number: ray.remote(num_cpus=0)(Worker).remote()  # noqa: E731
    scorers = RewardPool(start, 1, faults, lambda: HeartbeatDeadline(30.0, 1.0))
    scorers.result(scorers.submit(build.prompts(0, 1), ["x"]))
    scorers.begin_step()
    time.sleep(1.5)
    push_version(pool, 8)
    scorers.result(scorers.submit(build.prompts(0, 1), ["x"]))
    assert not (tmp_path / "faults.jsonl").exists()


def test_a_cancelled_generate_ends_even_if_its_engine_hangs(faults):
    pool = engine_pool(faults, 2, silence=4.0, hangs=8)
    with ThreadPoolExecutor(1) as thread:
        round_ = thread.submit(answered, pool)
        time.sleep(1)
        with pool.cancelling(), pytest.raises(GenerationCancelled):
            round_.result(timeout=20)
    assert faults.count == 0


def test_a_deterministic_step_is_interrupted_even_if_another_engine_hangs(faults):
    pool = engine_pool(faults, 2, silence=3.0, hangs=6, whole_steps=True)
    began = time.monotonic()
    with pytest.raises(StepInterrupted, match="rollout engine 0"):
        answered(pool, on_first=lambda: kill(pool.actors.actors[0]))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("count", [1, 3])
def test_the_open_requests_of_a_killed_engine_are_answered_once_by_the_current_weights(faults, tmp_path, count):
    pool = engine_pool(faults, count)
    samples = answered(pool, on_first=lambda: kill(pool.actors.actors[0]))
    assert sorted(sample.index for sample in samples) == list(range(12))
    assert {sample.weight_version for sample in samples} == {7}
    assert [(line["who"], line["what"]) for line in lines(tmp_path)] == [("rollout engine 0", "died")]


def test_a_replacement_engine_serves_after_the_next_weight_sync(faults):
    pool = engine_pool(faults, 2)
    samples = answered(pool, on_first=lambda: kill(pool.actors.actors[0]))
    assert {sample.engine for sample in samples[-3:]} == {1}
    push_version(pool, 8)
    assert {(sample.engine, sample.weight_version) for sample in answered(pool)} == {(0, 8), (1, 8)}


def test_an_engine_without_heartbeats_counts_as_hung(faults, tmp_path):
    samples = answered(engine_pool(faults, 2, silence=3.0, hangs=8))
    assert sorted(sample.index for sample in samples) == list(range(12))
    (line,) = lines(tmp_path)
    assert (line["who"], line["what"]) == ("rollout engine 1", "hung")
    assert "no heartbeat" in line["cause"]


def test_an_engine_killed_during_a_weight_sync_is_replaced(faults, tmp_path):
    pool = engine_pool(faults, 2)
    with pool.actors.updating() as engines:
        kill(engines[1])
        raise EngineLost(1, RuntimeError("gone"))
    assert sorted(pool.actors.serving) == [0]
    push_version(pool, 9)
    assert {(sample.engine, sample.weight_version) for sample in answered(pool)} == {(0, 9), (1, 9)}


def test_a_replacement_engine_killed_while_it_loads_is_replaced_too(faults):
    pool = engine_pool(faults, 2)
    pool.actors.replace_engine(EngineLost(1, RuntimeError("gone")), pool.actors.actors[1])
    kill(pool.actors.actors[1])
    push_version(pool, 8)
    assert {(sample.engine, sample.weight_version) for sample in answered(pool)} == {(0, 8), (1, 8)}
    assert faults.count == 2


def test_a_deterministic_step_is_interrupted_and_can_be_repeated(faults):
    pool = engine_pool(faults, 2, whole_steps=True)
    with pytest.raises(StepInterrupted, match="rollout engine 0"):
        answered(pool, on_first=lambda: kill(pool.actors.actors[0]))
    push_version(pool, 7)
    assert sorted(sample.index for sample in answered(pool)) == list(range(12))


def test_the_open_responses_of_a_killed_reward_worker_are_scored_again(faults, tmp_path):
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


def test_repeated_faults_end_the_run_with_the_root_cause(faults):
    pool = RewardPool(
        lambda number: ray.remote(num_cpus=0)(Broken).remote(), 1, faults, lambda: HeartbeatDeadline(30.0, 30.0)
    )
    with pytest.raises(TooManyFaults, match=r"4 faults of reward worker 0 without .* 0 died: .*actor"):
        pool.result(pool.submit(build.prompts(0, 1), ["x"]))


def test_an_actor_that_fails_to_start_is_an_error_and_not_a_fault(faults, tmp_path):
    class Wrong(Worker):
        def __init__(self):
            raise UserError("reward.path: no such folder")

    pool = RewardPool(
        lambda number: ray.remote(num_cpus=0)(Wrong).remote(), 1, faults, lambda: HeartbeatDeadline(30.0, 30.0)
    )
    with pytest.raises(Exception, match="no such folder"):
        pool.result(pool.submit(build.prompts(0, 1), ["x"]))
    assert not (tmp_path / "faults.jsonl").exists()


class Rank:
    """A learner that sleeps for as many seconds as it is told."""

    def setup(self, *paths):
        time.sleep(2)

    def work(self, seconds):
        time.sleep(seconds)
        return seconds


@pytest.fixture
def learners(monkeypatch):
    config = Config(faults=FaultsConfig(silence_s=1.0, start_s=30.0))
    monkeypatch.setattr(LearnerGroup, "_launch", lambda group: None)
    group = LearnerGroup(config, None)
    group.ranks = [ray.remote(num_cpus=0)(Rank).remote()]
    group.call("setup")  # a new process may take seconds
    return group


def test_a_silent_learner_is_lost_after_the_limit_for_working_actors(learners):
    began = time.monotonic()
    with pytest.raises(LearnersLost, match=r"no heartbeat for 1 s in work \(faults.silence_s=1\)"):
        learners.call("work", 60)
    assert time.monotonic() - began < 10


def test_a_call_of_a_learner_may_wait_for_an_earlier_one(learners):
    calls = [learners._begin("work", 0.7) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(learners.result, calls)) == [0.7, 0.7]


def sleepers(faults, log, count) -> EnginePool:
    def start(number):
        return ray.remote(num_cpus=0)(Sleeper).remote(number, log)

    return EnginePool(start, count, faults, lambda: HeartbeatDeadline(30.0, 30.0), shares_gpus=True)


def test_engines_on_shared_gpus_sleep_before_anything_else_starts(faults, tmp_path):
    log = tmp_path / "calls"
    sleepers(faults, log, 2).settle()
    calls = log.read_text().split("\n")[:-1]
    assert sorted(calls[:2]) == ["load 0", "load 1"]
    assert {"sleep 0", "sleep 1"} == set(calls[2:])


def test_a_replacement_on_shared_gpus_sleeps_before_the_others_go_on(faults, tmp_path):
    pool, log = sleepers(faults, tmp_path / "calls", 2), tmp_path / "calls"
    pool.settle()
    log.unlink()
    pool.actors.replace_engine(EngineLost(1, RuntimeError("gone")), pool.actors.actors[1])
    assert log.read_text() == "load 1\nsleep 1\n"


def test_a_replacement_that_fails_to_start_is_one_more_fault(faults, tmp_path):
    pool = sleepers(faults, tmp_path / "calls", 1)
    pool.settle()
    (tmp_path / "failures").write_text("2")
    pool.actors.replace_engine(EngineLost(0, RuntimeError("gone")), pool.actors.actors[0])
    assert [line["who"] for line in lines(tmp_path)] == ["rollout engine 0"] * 3
    assert "Free memory" in lines(tmp_path)[-1]["cause"]
    assert ray.get(pool.actors.actors[0].ready.remote())
    faults.step_finished(1)
    (tmp_path / "failures").write_text("9")
    with pytest.raises(TooManyFaults, match="Free memory"):
        pool.actors.replace_engine(EngineLost(0, RuntimeError("gone")), pool.actors.actors[0])


def test_the_error_of_one_rank_is_raised_while_the_others_still_run():
    class Rank:
        def train(self, rank):
            yield rank
            if rank == 1:
                raise UserError("demonstrations.jsonl: no such file")
            time.sleep(60)

    ranks = [ray.remote(num_cpus=0)(Rank).remote() for _ in range(2)]
    streams = [rank.train.options(num_returns="streaming").remote(number) for number, rank in enumerate(ranks)]
    with pytest.raises(UserError, match="no such file"):
        list(merge_streams(streams))


def test_a_new_step_resets_the_limit_but_not_the_count_of_faults(faults, tmp_path):
    for step in range(5):
        for _ in range(3):
            faults.record(ActorLost("reward worker 0", RuntimeError("gone")), "a new one replaces it")
        faults.step_finished(step + 1)
    assert faults.count == faults.reward_worker_count == len(lines(tmp_path)) == 15
    assert FaultLog(tmp_path / "faults.jsonl", limit=3).count == 15
    assert FaultLog(tmp_path / "faults.jsonl", limit=3).reward_worker_count == 15
