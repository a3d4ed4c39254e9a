"""Stopping a run: signals wait for the current step and its checkpoint, and a second driver waits for the first."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

from metaalign_rl.core.errors import UserError
from metaalign_rl.runtime import signals
from metaalign_rl.runtime.exit_status import guarded
from metaalign_rl.runtime.run_lock import run_lock
from metaalign_rl.trainers.callbacks import StopRequest, TrainingStopped

# Signals.


@contextmanager
def stopped(number: int) -> Iterator[None]:
    """Expect the block to raise `StopSignal` for this signal."""
    with pytest.raises(signals.StopSignal) as caught, signals.raise_on_signals():
        yield
    assert caught.value.number == number


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_interrupts_immediately(number: signal.Signals) -> None:
    with stopped(number):
        os.kill(os.getpid(), number)
        pytest.fail("went on")


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_deferred_signal_lets_the_block_finish(number: signal.Signals) -> None:
    done = []
    with stopped(number):
        with signals.defer_signals():
            os.kill(os.getpid(), number)
            done.append("the update")
        done.append("the next step")
    assert done == ["the update"]


def test_a_deferred_signal_is_raised_even_if_the_block_fails() -> None:
    with stopped(signal.SIGTERM), signals.defer_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a learner died")


def test_a_second_ctrl_c_is_not_deferred() -> None:
    done = []

    def work() -> None:
        with signals.raise_on_signals(), signals.defer_signals():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the update")
            os.kill(os.getpid(), signal.SIGINT)
            done.append("went on")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["the update"]


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_the_exit_status_depends_on_the_signal(number: signal.Signals) -> None:
    def run() -> None:
        with signals.raise_on_signals():
            os.kill(os.getpid(), number)

    assert guarded(run, resume="") == 128 + number


def test_the_previous_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopped(signal.SIGTERM):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_submitted_job_warns_if_a_stop_would_kill_it_during_a_save(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not signals.warn_if_stop_kills_save(seconds=10)  # not submitted
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert not signals.warn_if_stop_kills_save(seconds=2)
    assert capsys.readouterr().err == ""
    assert signals.warn_if_stop_kills_save(seconds=10)
    assert "RAY_JOB_STOP_WAIT_TIME_S=40 where the cluster's head node starts" in capsys.readouterr().err
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "120")
    assert not signals.warn_if_stop_kills_save(seconds=10)


# Trainings.


def test_a_stopped_training_saves_after_the_current_step(tmp_path: Path) -> None:
    """With transformers' Trainer, which trains SFT and the reward model."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    request = StopRequest()

    class AskInStepThree(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                request.set()

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, labels):
            return {"loss": ((self.weight * x - labels) ** 2).mean()}

    arguments = TrainingArguments(str(tmp_path), max_steps=9, save_steps=100, report_to="none", use_cpu=True)
    rows = [{"x": torch.tensor([1.0]), "labels": torch.tensor([2.0])}] * 100
    trainer = Trainer(Line(), arguments, train_dataset=rows, callbacks=[AskInStepThree(), request.callback()])
    with pytest.raises(TrainingStopped, match="after step 3"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


# One driver at a time.

HOLDER = "from pathlib import Path; from metaalign_rl.runtime.run_lock import run_lock\nwith run_lock(Path({!r})): {}"


@pytest.fixture
def other_driver(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock on `tmp_path`."""
    code = HOLDER.format(str(tmp_path), "print('working', flush=True); input()")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "working\n"
        yield process
        process.kill()


def test_a_second_driver_of_a_run_is_refused(other_driver: subprocess.Popen[str], tmp_path: Path) -> None:
    name = f"another driver .process {other_driver.pid} on .*, since .*give another run.name"
    with pytest.raises(UserError, match=name), run_lock(tmp_path, timeout=0.1):
        raise AssertionError("both work")


def test_a_driver_waits_for_another_one_to_end(
    other_driver: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threading.Timer(0.5, other_driver.kill).start()
    began = time.monotonic()
    with run_lock(tmp_path):
        assert 0.4 < time.monotonic() - began < 30
    assert "works on this run; waiting 180 s for it to end" in capsys.readouterr().out


def test_a_killed_driver_releases_its_lock(other_driver: subprocess.Popen[str], tmp_path: Path) -> None:
    other_driver.kill()
    other_driver.wait()
    with run_lock(tmp_path, timeout=0), pytest.raises(UserError), run_lock(tmp_path, timeout=0):
        pass


def test_storage_without_file_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match="does not support file locks .Operation not supported.*give a run.root where"):
        run_lock(tmp_path).__enter__()
