"""The log of faults, and the limits that it sets."""

import json
from pathlib import Path

import pytest

from metaalign_rl.runtime.faults import ActorLost, EngineLost, FaultLog, LearnersLost, TooManyFaults


@pytest.fixture
def faults(tmp_path: Path) -> FaultLog:
    return FaultLog(tmp_path / "faults.jsonl", limit=3, report=lambda line: None)


def test_many_actors_may_be_lost_together_with_their_node(faults):
    for number in range(16):
        faults.record(EngineLost(number, RuntimeError("gone")), "a new one replaces it")
    assert faults.count == 16


def test_learners_that_always_die_at_one_step_end_the_run_although_earlier_steps_are_repeated(faults):
    lost = [LearnersLost(f"learner rank {rank}", RuntimeError("gone")) for rank in range(4)]
    for one in lost[:3]:
        faults.step_finished(1)
        faults.step_finished(2)
        faults.record(one, "all ranks start again")
    faults.step_finished(1)
    with pytest.raises(TooManyFaults, match="4 faults of the learners"):
        faults.record(lost[3], "all ranks start again")


def test_an_incomplete_line_of_the_fault_file_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    lost = ActorLost("reward worker 0", TimeoutError("silent"))
    FaultLog(path, limit=5, report=lambda line: None).record(lost, "replaced")
    path.write_text(path.read_text() + '{"time": "20')
    log = FaultLog(path, limit=5, report=lambda line: None)
    assert log.count == 1
    log.record(lost, "replaced")
    assert [json.loads(line)["who"] for line in path.read_text().splitlines()] == [lost.who] * 2
