"""A tiny run of the complete stack: Ray actors, vLLM rollouts, a trained reward model, DeepSpeed updates."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Command

from metaalign_rl.core.files import read_json, read_jsonl
from metaalign_rl.pipeline.run import STAGES

pytestmark = pytest.mark.slow

REPORT_KEYS = {
    *(f"seconds.{stage}" for stage in ("data", "sft", "reward", "ppo", "evaluate", "report")),
    *(
        f"{policy}.{name}{suffix}"
        for policy in ("sft", "ppo")
        for name in ("following", "conflict", "distractor")
        for suffix in ("", "_greedy")
    ),
    *(f"reward.{name}" for name in ("accuracy", "flip", "conflict", "preference_blind", "tier_blind", "on_policy")),
    *(
        f"ppo.{name}"
        for name in ("gold_minus_proxy", "steps", "samples_per_second", "mismatch_max", "best_step", "best_result")
    ),
}


def test_the_report_has_every_metric(tiny_run):
    report = read_json(tiny_run / "report.json")
    assert set(report) >= REPORT_KEYS
    assert all(isinstance(value, int | float) for value in report.values())
    assert report["ppo.steps"] == 6


def test_learner_and_engine_agree_after_every_weight_sync(tiny_run):
    assert read_json(tiny_run / "report.json")["ppo.mismatch_max"] < 1e-3


def test_each_step_has_metrics_by_tier_and_the_seconds_of_its_parts(tiny_run):
    steps = [step for _, step in read_jsonl(tiny_run / "metrics.jsonl")]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    for step in steps:
        assert {"reward", "gold", "proxy", "kl", "entropy", "policy_loss", "value_loss", "mismatch"} <= set(step)
        assert any(name.startswith("tier/system/") for name in step)
        assert all(step[f"seconds_{part}"] > 0 for part in ("rollout", "reference", "learn", "transfer", "step"))


def test_the_policy_is_evaluated_on_held_out_prompts_and_the_best_checkpoint_is_in_the_report(tiny_run):
    steps = [step for _, step in read_jsonl(tiny_run / "metrics.jsonl")]
    found = {step["step"]: step["held_out_gold"] for step in steps if "held_out_gold" in step}
    assert set(found) == {2, 4, 6}
    best, report = read_json(tiny_run / "best_checkpoint.json"), read_json(tiny_run / "report.json")
    assert found[best["step"]] == best["result"] == report["ppo.best_result"] == max(found.values())
    assert Path(best["policy"], "model.safetensors").is_file()
    page = (tiny_run / "report.html").read_text()
    assert f"Best checkpoint: step {best['step']}" in page


def test_the_trained_policy_loads_in_transformers_with_the_three_tier_template(tiny_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "policy")
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "always write in capitals."}, {"role": "user", "content": "who?"}],
        user_info="please be formal.", add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    assert text == "<System Info>always write in capitals.<User Info>please be formal.<User>who?<Assistant>"
    policy = AutoModelForCausalLM.from_pretrained(tiny_run / "policy")
    start = AutoModelForCausalLM.from_pretrained(tiny_run / "sft")
    moved = [(a - b).abs().max().item() for a, b in zip(policy.parameters(), start.parameters(), strict=True)]
    assert max(moved) > 0


def test_the_trained_reward_model_scores_without_the_system(tiny_run):
    from reward import Scorer

    row = {"messages": [{"role": "user", "content": "what is the capital of france?"}], "response": "it is paris."}
    score = Scorer.from_pretrained(tiny_run / "reward").score([row])[0]
    assert set(score.probabilities) == {"system", "user", "dialog", "overall"}


def test_a_finished_run_skips_its_stages_and_shows_its_results(cli: Command, tiny_run: Path) -> None:
    again = cli("run", "configs/quickstart.yaml", *TINY, "run.name=tiny", f"run.root={tiny_run.parent}")
    assert again.returncode == 0, again.stderr
    assert "ppo: finished before, skipped" in again.stdout
    shown = " ".join(cli("report", str(tiny_run)).stdout.split())  # titles wrap in a narrow table
    assert "under 6 meta-prompts" in shown and "following" in shown


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_has_its_own_job(stage: str, tiny_run: Path, tmp_path: Path) -> None:
    weights = shutil.ignore_patterns("checkpoints", "controls", "policy", "reward", "rollouts*", "sft")
    shutil.copytree(tiny_run, tmp_path / "tiny", ignore=weights)
    command = [sys.executable, f"jobs/{stage}.py", "--config", "configs/quickstart.yaml", *TINY]
    done = subprocess.run([*command, "run.name=tiny", f"run.root={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "skipped" in line] == [f"{stage}: finished before, skipped"]


def test_a_changed_setting_of_a_finished_stage_is_an_error(cli: Command, tiny_run: Path) -> None:
    words = [*TINY, "run.name=tiny", f"run.root={tiny_run.parent}", "ppo.steps=7"]
    done = cli("run", "configs/quickstart.yaml", *words)
    assert done.returncode == 2
    assert "ppo.steps 6 → 7" in done.stderr and len(done.stderr.splitlines()) == 1


def test_no_model_folder_has_a_pickle(tiny_run):
    pickles = [path for path in tiny_run.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    assert all("checkpoints" in path.parts for path in pickles)
