"""A run of the complete stack whose processes are killed gives the same result as a run without faults.

In deterministic mode the results are equal to the last bit. The tiny run is the run without faults.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from processes import family

from metaalign_rl.core.files import read_json, read_jsonl

pytestmark = pytest.mark.slow


@pytest.fixture
def copied(tiny_run: Path, tmp_path: Path) -> Path:
    """The folder of a run `killed`: a copy of the tiny run as it was before PPO."""
    folder = tmp_path / "killed"
    after = ("metrics.jsonl", "report.json", "report.html", "policy", "evaluation", "checkpoints", "rollouts")
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns(*after, "tensorboard"))
    finished = read_json(folder / "stages.json")
    (folder / "stages.json").write_text(json.dumps({stage: finished[stage] for stage in ("data", "sft", "reward")}))
    return folder


def test_a_run_survives_a_kill_of_each_process_with_the_same_metrics(tiny_run: Path, copied: Path) -> None:
    """The run replaces a killed engine, reward worker and learner. The same command resumes after a killed driver."""
    run = _start(copied)
    for step, process in ((1, "ray::RolloutEngine"), (2, "ray::RewardWorker"), (3, "ray::Learner")):
        _wait_until(lambda step=step: len(_steps(copied)) >= step, run)
        os.kill(_child(run, process), signal.SIGKILL)
        _wait_until(lambda step=step: len(_lines(copied / "faults.jsonl")) == step, run)
    _wait_until(lambda: len(_steps(copied)) >= 4, run)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    run = _start(copied)
    assert run.wait(timeout=300) == 0

    assert _steps(copied) == _steps(tiny_run)
    assert [line["who"] for line in _lines(copied / "faults.jsonl")] == [
        "rollout engine 0",
        "reward worker 0",
        "learner rank 0",
    ]
    assert (copied / "policy" / "model.safetensors").is_file()


def _steps(folder: Path) -> list[dict[str, float]]:
    """The metrics of the steps, without durations and faults."""
    path = folder / "metrics.jsonl"
    steps = [step for _, step in read_jsonl(path)] if path.is_file() else []
    return [{k: v for k, v in step.items() if not k.startswith("seconds") and "faults" not in k} for step in steps]


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _start(folder: Path) -> subprocess.Popen[bytes]:
    words = [*TINY, f"run.name={folder.name}", f"run.root={folder.parent}", "run.stages=[data,sft,reward,ppo]"]
    command = [sys.executable, "-m", "metaalign_rl", "run", "configs/quickstart.yaml", *words]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=log, stderr=log)


def _child(run: subprocess.Popen[bytes], title: str) -> int:
    """The run's process with this title. Ray gives an actor's process the name of the actor's class."""
    return next(process.pid for process in family(run.pid) if title in " ".join(process.cmdline()))


def _wait_until(condition: Callable[[], bool], run: subprocess.Popen[bytes], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, "the run ended early; see its log.txt"
        assert time.monotonic() < end, "the run took too long"
        time.sleep(0.05)
