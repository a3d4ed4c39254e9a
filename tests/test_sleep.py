"""An engine that shares a GPU with its learners frees its memory and allocates it again. vLLM is replaced by a fake."""

from concurrent.futures import ThreadPoolExecutor
from threading import get_ident
from types import SimpleNamespace

import pytest

from metaalign_rl.config.schema import ClusterConfig, Config, RunConfig
from metaalign_rl.core.dataflow import Sampling
from metaalign_rl.learner.worker import Learner
from metaalign_rl.pipeline import context
from metaalign_rl.ppo.collector import Collector
from metaalign_rl.rollout.engine import RolloutEngine
from metaalign_rl.rollout.engine_args import cpu_options, gpu_options
from metaalign_rl.runtime.gpu_memory import frees_gpu_memory
from metaalign_rl.scoring.worker import RewardWorker
from metaalign_rl.weights import StaleEngine


class RecordingEngine:
    """A fake of vLLM's engine that records the calls."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.threads: set[int] = set()

    def _record(self, call: object) -> None:
        self.calls.append(call)
        self.threads.add(get_ident())

    def sleep(self, level: int) -> None:
        self._record(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self._record(tags)

    def collective_rpc(self, method: str, args: tuple[object, ...]) -> None:
        self._record(method)

    def has_unfinished_requests(self) -> bool:
        return False

    def abort_request(self, requests: list[str]) -> None:
        """There are none."""


@pytest.fixture
def engine() -> RolloutEngine:
    engine = RolloutEngine.__new__(RolloutEngine)
    engine._engine, engine._thread = RecordingEngine(), ThreadPoolExecutor(1)
    engine._sleeps, engine._asleep = True, []
    engine._begin()
    return engine


def test_a_sleeping_engine_takes_weights_before_it_has_room_for_keys_and_values(engine):
    engine.sleep()
    engine.sleep()
    engine.start_weight_update()
    engine.update_weights({})
    engine._has_weights = True  # as at the end of an update
    list(engine.generate([], Sampling()))
    engine.wake_up()
    expected = ["sleep 2", ["weights"], "start_weight_update", "update_weights", ["kv_cache"]]
    assert engine._engine.calls == expected


def test_an_engine_that_discarded_its_weights_generates_only_after_an_update(engine):
    engine.sleep()
    with pytest.raises(StaleEngine, match="discarded .* no update followed"):
        list(engine.generate([], Sampling()))


def test_an_engine_that_keeps_its_weights_may_generate_after_sleeping(engine):
    engine.sleep(keep_weights=True)
    list(engine.generate([], Sampling()))
    assert engine._engine.calls == ["sleep 1", ["weights", "kv_cache"]]


def test_an_engine_with_memory_of_its_own_does_not_sleep(engine):
    engine._sleeps = False
    engine.sleep()
    assert engine._engine.calls == []


@pytest.mark.parametrize(("tokens", "kind"), [(None, "cpu"), (4096, "cpu"), (None, "gpu"), (4096, "gpu")])
def test_the_prefill_budget_is_a_setting_with_vllm_s_defaults(tokens, kind):
    options = cpu_options(1.0, 512, tokens) if kind == "cpu" else gpu_options(0.4, True, tokens)
    assert options["max_num_batched_tokens"] == (tokens or {"cpu": 8192, "gpu": None}[kind])


def test_cached_gpu_memory_is_returned_also_after_an_error(monkeypatch):
    returned = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: returned.append(True))

    @frees_gpu_memory
    def work(fails: bool) -> str:
        if fails:
            raise ValueError("out of range")
        return "done"

    assert work(False) == "done"
    with pytest.raises(ValueError, match="out of range"):
        work(True)
    assert len(returned) == 2
    for method in (Learner.train, Learner.evaluate, Learner.send_weights, RewardWorker.score):
        assert method.__wrapped__


def test_vllm_works_in_one_thread_whoever_calls(engine):
    callers = ThreadPoolExecutor(3)
    for call in (engine.sleep, engine.start_weight_update, engine.wake_up, lambda: engine.update_weights({})):
        callers.submit(call).result()
    assert len(engine._engine.threads) == 1


@pytest.mark.parametrize(("layout", "expected"), [("colocated", [True]), ("disaggregated", [])])
def test_engines_that_share_devices_sleep_after_an_evaluation_and_keep_their_weights(layout, expected):
    sleeps = []
    config = Config(cluster=ClusterConfig(gpus=2, layout=layout))
    engines = SimpleNamespace(sleep=lambda keep_weights: sleeps.append(keep_weights))
    Collector(config, None, engines, None, None, None, 0).rest()
    assert sleeps == expected


@pytest.mark.parametrize(("layout", "expected"), [("colocated", ["answer", "sleep"]), ("disaggregated", ["answer"])])
def test_engines_that_share_gpus_sleep_after_each_use_by_a_stage(layout, expected, monkeypatch, tmp_path):
    calls = []
    engines = SimpleNamespace(answer=lambda *_: calls.append("answer") or [], sleep=lambda: calls.append("sleep"))
    monkeypatch.setattr(context.EnginePool, "start", lambda *_: engines)
    monkeypatch.setattr(context, "load_tokenizer", lambda _: None)
    config = Config(run=RunConfig(root=str(tmp_path)), cluster=ClusterConfig(gpus=2, layout=layout))
    context.RunContext(config).answer(tmp_path, [], Sampling())
    assert calls == expected
