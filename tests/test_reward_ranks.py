"""Training on two ranks, in real processes on the CPU, compared with training on one."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, python_path
from reward_toys import color_pairs, language_model
from safetensors.torch import load_file

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import write_jsonl
from metaalign_rl.trainers.reward import RewardTrainerActor
from reward import RewardTraining, train
from reward.cli import main

pytestmark = pytest.mark.slow

# 70 rows: the last of the five updates per epoch has only six, three for each rank in place of eight.
CONFIG = RewardTraining(
    learning_rate=1e-3, batch_size=16, epochs=2, max_tokens=128, calibration_share=0.0, log_steps=1,
    margin=0.5, label_smoothing=0.05, checkpoint_steps=4,
)  # fmt: skip
ROWS = [replace(row, labels=row.labels if index % 3 else {}) for index, row in enumerate(color_pairs(70))]
TRAININGS = {
    "plain": (CONFIG, 0),
    "passes": (replace(CONFIG, gradient_accumulation=2, token_weight=1.0), 2),
    "lora": (replace(CONFIG, lora_rank=4, token_weight=1.0), 1),
}
BFLOAT16 = {"bfloat16": (replace(CONFIG, bf16=True, token_weight=1.0), 1)}


def run_rank(rank: int, folder: Path, base: Path, names: list[str]) -> None:
    """One of two ranks; it runs the trainings one after the other."""
    torch.set_num_threads(1)
    trainer = RewardTrainerActor("whole", rank, 2, f"file://{folder}/ranks")
    for name in names:
        config, stage = (TRAININGS | BFLOAT16)[name]
        for _ in trainer.train(config, [folder / "pairs.jsonl"], base, folder / name, stage):
            pass


def start_ranks(folder: Path, names: list[str]) -> list[Any]:
    (folder / "ranks").unlink(missing_ok=True)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["deepspeed", "reward.training.train"])  # imports that take seconds, done once
    ranks = [processes.Process(target=run_rank, args=(rank, folder, language_model(), names)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    return ranks


def join(ranks: list[Any]) -> list[int | None]:
    for process in ranks:
        process.join(timeout=300)
    return [process.exitcode for process in ranks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two ranks have done all trainings."""
    folder = tmp_path_factory.mktemp("ranks")
    write_jsonl(folder / "pairs.jsonl", [row.to_json() for row in ROWS])
    assert join(start_ranks(folder, [*TRAININGS, *BFLOAT16])) == [0, 0]
    return folder


@pytest.mark.parametrize("name", TRAININGS)
def test_two_ranks_make_the_same_updates_as_one(folder: Path, tmp_path: Path, name: str) -> None:
    one = train(TRAININGS[name][0], ROWS, None, language_model(), tmp_path / "one")
    two = json.loads((folder / name / "training.json").read_text())
    assert two["steps"] == one["steps"] == 10
    for found, expected in zip(two["log"], one["log"], strict=True):
        for metric in {"loss", "bt", "bce", "accuracy", "learning_rate"} & expected.keys():
            assert found[metric] == pytest.approx(expected[metric], rel=1e-3, abs=1e-6), metric
    weights = [load_file(path / "model.safetensors") for path in (folder / name, tmp_path / "one")]
    torch.testing.assert_close(*weights, atol=2e-5, rtol=0)
    assert not (folder / f"{name}.checkpoints").exists()


def test_bf16_computes_in_bfloat16_and_keeps_the_weights_in_float32(folder: Path, tmp_path: Path) -> None:
    one = train(BFLOAT16["bfloat16"][0], ROWS, None, language_model(), tmp_path / "one")["log"][0]["bce"]
    two, exact = (
        json.loads((folder / name / "training.json").read_text())["log"][0]["bce"] for name in ("bfloat16", "passes")
    )
    assert two == pytest.approx(one, rel=1e-5)
    assert two != pytest.approx(exact, rel=1e-5)
    assert {tensor.dtype for tensor in load_file(folder / "bfloat16" / "model.safetensors").values()} == {torch.float32}


def test_torchrun_trains_on_several_devices_without_deepspeed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "metaalign_reward.py"  # the same as the script metaalign-reward that pip installs
    program.write_text("import sys; from reward.cli import main; sys.exit(main())")
    flags = ["--learning-rate", "1e-3", "--batch-size", "16", "--max-tokens", "128", "--calibration-share", "0"]
    pairs = folder / "pairs.jsonl"
    words = ["train", "--base", str(language_model()), "--data", str(pairs), "--eval-data", str(pairs), *flags]
    assert main([*words, "--output", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out.count("5 updates") == 1
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*ranks, program, *words, "--output", tmp_path / "two"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": python_path(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 updates") == 1
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    torch.testing.assert_close(*weights, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["passes", "lora"])
def test_killed_ranks_resume_together(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "pairs.jsonl").write_bytes((folder / "pairs.jsonl").read_bytes())
    ranks = start_ranks(tmp_path, [name])
    first = tmp_path / f"{name}.checkpoints" / "checkpoint-4" / "trainer_state.json"
    while all(process.is_alive() for process in ranks) and not first.exists():
        time.sleep(0.005)
    for process in ranks:
        process.kill()
    assert join(ranks) == [-signal.SIGKILL] * 2
    assert not (tmp_path / name).exists()
    assert join(start_ranks(tmp_path, [name])) == [0, 0]
    weights = [load_file(path / name / "model.safetensors") for path in (folder, tmp_path)]
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


def test_a_batch_that_does_not_divide_among_the_devices_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="batch_size: expected a multiple of 3, .* on 3 devices, found 16"):
        train(CONFIG, ROWS, None, language_model(), tmp_path / "reward")
