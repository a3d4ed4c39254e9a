"""One run of the whole stack at a tiny size: Ray actors, vLLM rollouts, a trained reward model, DeepSpeed updates."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, metaalign_rl

from metaalign_rl.files import read_json, read_jsonl

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
    *(f"ppo.{name}" for name in ("gold_minus_proxy", "steps", "samples_per_second", "mismatch_max")),
}


def test_the_report_holds_every_figure(tiny_run):
    report = read_json(tiny_run / "report.json")
    assert set(report) >= REPORT_KEYS
    assert all(isinstance(value, int | float) for value in report.values())
    assert report["ppo.steps"] == 2


def test_learner_and_engine_agree_on_every_transfer(tiny_run):
    assert read_json(tiny_run / "report.json")["ppo.mismatch_max"] < 1e-3


def test_each_step_says_what_happened_by_tier_and_where_its_seconds_went(tiny_run):
    steps = [step for _, step in read_jsonl(tiny_run / "metrics.jsonl")]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert {"reward", "gold", "proxy", "kl", "entropy", "policy_loss", "value_loss", "mismatch"} <= set(step)
        assert any(name.startswith("tier/system/") for name in step)
        assert all(step[f"seconds_{part}"] > 0 for part in ("rollout", "reference", "learn", "transfer", "step"))


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


def test_the_trained_reward_model_scores_by_itself(tiny_run):
    from reward import Scorer

    row = {"messages": [{"role": "user", "content": "what is the capital of france?"}], "response": "it is paris."}
    score = Scorer.from_pretrained(tiny_run / "reward").score([row])[0]
    assert set(score.probabilities) == {"system", "user", "dialog", "overall"}


def test_a_finished_run_is_skipped_and_its_results_are_shown_again(tiny_run):
    again = metaalign_rl("run", "configs/quickstart.yaml", *TINY, "run.name=tiny", f"run.root={tiny_run.parent}")
    assert again.returncode == 0, again.stderr
    assert "ppo: finished before, skipped" in again.stdout
    shown = " ".join(metaalign_rl("report", str(tiny_run)).stdout.split())  # titles wrap where a table is narrow
    assert "under 6 meta-prompts" in shown and "following" in shown


def test_another_setting_for_a_finished_stage_is_refused(tiny_run):
    done = metaalign_rl(
        "run", "configs/quickstart.yaml", *TINY, "run.name=tiny", f"run.root={tiny_run.parent}", "ppo.steps=3"
    )
    assert done.returncode == 2
    assert "ppo.steps from 2 to 3" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_run_killed_in_ppo_goes_on_from_its_last_step(tiny_run, tmp_path):
    """Kill -9 the driver and everything it started after the first steps; the same command finishes the run."""
    folder = tmp_path / "killed"
    left_out = shutil.ignore_patterns("metrics.jsonl", "report.json", "policy", "evaluation", "checkpoints")
    shutil.copytree(tiny_run, folder, ignore=left_out)
    finished = read_json(folder / "stages.json")
    kept = {stage: finished[stage] for stage in ("data", "sft", "reward")}
    (folder / "stages.json").write_text(json.dumps(kept))
    words = [*TINY, "run.name=killed", f"run.root={tmp_path}", "ppo.steps=6", "run.stages=[data,sft,reward,ppo]"]
    first = _start(words)
    _wait_for(lambda: (folder / "checkpoints" / "ppo" / "step-2").is_dir(), first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = metaalign_rl("run", "configs/quickstart.yaml", *words)
    assert done.returncode == 0, done.stderr
    steps = [step["step"] for _, step in read_jsonl(folder / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (folder / "policy" / "model.safetensors").is_file()


def _start(words: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "metaalign_rl", "run", "configs/quickstart.yaml", *words]
    return subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _wait_for(condition, process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "the run took too long"
        time.sleep(0.1)


def test_no_pickle_is_left_where_a_model_is_loaded_from(tiny_run):
    pickles = [path for path in tiny_run.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    assert all("checkpoints" in path.parts for path in pickles)
