"""An engine that shares a GPU with its learners frees its memory and allocates it again. vLLM is replaced by a fake."""

from threading import Event, Lock

import pytest

from metaalign_rl.core.dataflow import Sampling
from metaalign_rl.rollout.engine import RolloutEngine


class RecordingEngine:
    """A fake of vLLM's engine that records the calls."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(tags)

    def collective_rpc(self, method: str, args: tuple[object, ...]) -> None:
        self.calls.append(method)

    def has_unfinished_requests(self) -> bool:
        return False

    def abort_request(self, requests: list[str]) -> None:
        """There are none."""


@pytest.fixture
def engine() -> RolloutEngine:
    engine = RolloutEngine.__new__(RolloutEngine)
    engine._engine, engine._lock, engine._running = RecordingEngine(), Lock(), Event()
    engine._sleeps, engine._asleep, engine._is_updating, engine._first_versions = True, [], False, {}
    return engine


def test_a_sleeping_engine_takes_weights_before_it_has_room_for_keys_and_values(engine):
    engine.sleep()
    engine.sleep()
    engine.start_weight_update()
    engine.update_weights({})
    list(engine.generate([], Sampling()))
    engine.wake_up()
    expected = ["sleep 1", ["weights"], "start_weight_update", "update_weights", ["kv_cache"]]
    assert engine._engine.calls == expected


def test_an_engine_with_memory_of_its_own_does_not_sleep(engine):
    engine._sleeps = False
    engine.sleep()
    assert engine._engine.calls == []
