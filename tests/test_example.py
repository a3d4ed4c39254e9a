"""examples/ppo_loop.py: it runs without the packages of the distributed loop, and it learns."""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, load_script
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from benchmarks.example import read_table
from metaalign_rl.config.schema import ModelConfig
from metaalign_rl.core.dataflow import RELATIONS, Row
from metaalign_rl.core.tokenizers import load_tokenizer
from metaalign_rl.data.world.build import demonstrations, prompts
from metaalign_rl.trainers.base_model import prepare_base
from reward.score import Score

SCRIPT = ROOT / "examples" / "ppo_loop.py"
TINY = {
    "hidden-size": 32, "demonstrations": 320, "pairs": 64, "own-responses": 16, "held-out": 24, "steps": 2,
    "prompts-per-step": 8, "samples-per-prompt": 2, "minibatch": 4,
}  # fmt: skip
# Runs it twice, then prints as JSON both tables and the modules that were imported.
PROGRAM = """
import json, runpy, sys
script, *words = sys.argv[1:]
main = runpy.run_path(script)["main"]
tables = [main(words), main(words)]
print(json.dumps([tables, [name for name, module in sys.modules.items() if module is not None]]))
"""


@pytest.fixture(scope="module")
def loop() -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Any, Any, Any]:
    """An untrained policy, a critic and their tokenizer."""
    torch.manual_seed(0)
    prepare_base(ModelConfig(hidden_size=32, layers=1, heads=2), demonstrations(0, 50, 1.0), 0, tmp_path)
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(tmp_path), critic, load_tokenizer(tmp_path)


def test_all_stages_run_without_ray_vllm_and_deepspeed_and_a_seed_repeats_the_numbers() -> None:
    words = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-c", PROGRAM, SCRIPT, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    (first, second), modules = json.loads(last)
    assert "transformers" in modules
    assert not {"ray", "vllm", "deepspeed"} & set(modules)

    assert first == second
    assert set(first) == {"after SFT", "after PPO"}
    for figures in first.values():
        assert set(figures) == {"mean", "KL", *RELATIONS}
        assert all(0 <= figures[name] <= 1 for name in ("mean", *RELATIONS))
    assert first["after SFT"]["KL"] == 0
    assert first["after PPO"]["KL"] != 0
    steps = [line for line in lines if line.startswith("ppo ")]
    assert len(steps) == 2 * TINY["steps"]
    for line in steps:
        found = re.search(r"step +\d/2  reward (\S+)  gold (\S+)  kl (\S+)  value_loss (\S+)  length (\S+)", line)
        assert found, line
        reward, gold, _, value_loss, length = map(float, found.groups())
        assert 0 < reward < 1
        assert 0 <= gold <= 1
        assert 1 <= length <= 32
        assert 0 < value_loss < 1
    assert [line.split()[0] for line in lines if line.startswith("after ")] == ["after"] * 4
    printed = read_table(done.stdout)
    assert printed == {name: {k: round(v, 2) for k, v in figures.items()} for name, figures in first.items()}


def test_generate_samples_from_the_same_probabilities_that_the_update_computes(
    loop: ModuleType, models: tuple[Any, Any, Any]
) -> None:
    policy, _, tokenizer = models
    policy.lm_head.weight.data *= 1e4  # one token has all of the probability, whatever comes before
    rollouts = loop.generate(policy, tokenizer, prompts(0, 6), copies=3)
    batch = loop.to_batch(rollouts, tokenizer)
    assert len(rollouts) == 18
    assert len({len(one.prompt_ids) for one in rollouts}) > 1  # some prompts are padded
    with torch.no_grad():
        assert loop.logprobs(policy, batch)[batch.action_mask].min() > -1e-3


def test_ppo_raises_a_reward_that_can_be_counted(loop: ModuleType, models: tuple[Any, Any, Any]) -> None:
    rewards = []

    class CountsCapitals:
        def score(self, rows: list[Row]) -> list[Score]:
            shares = [sum(map(str.isupper, row.response)) / max(1, len(row.response)) for row in rows]
            rewards.append(fmean(shares))
            return [Score(float(torch.tensor(share).logit(eps=1e-3)), {}) for share in shares]

    policy, critic, tokenizer = models
    small = {"prompts_per_step": 8, "samples_per_prompt": 8, "minibatch": 4}
    config = loop.Config(steps=12, learning_rate=0.01, critic_learning_rate=0.01, kl_coef=0.0, **small)
    loop.train_ppo(config, policy, critic, CountsCapitals(), tokenizer, prompts(0, 200))
    assert fmean(rewards[-3:]) > fmean(rewards[:3]) + 0.05, rewards


def test_too_few_held_out_rows_are_an_error_before_training(
    loop: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        loop.main(["--held-out", "5"])
    assert "--held-out is 5: it must be at least 6" in capsys.readouterr().err
