"""`report.json`: a run's metrics as one flat object."""

import time
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.files import read_json, read_log, write_json
from metaalign_rl.monitoring.alarms import find_alarms

POLICIES = {"sft": "before PPO", "ppo": "after PPO"}
HEADLINES = ("following", "conflict", "distractor")


def write(folder: RunFolder, mode: str) -> dict[str, float]:
    """Write `report.json` from the stages' files. docs/evaluation.md explains the keys.

    The keys of a stage that did not run are missing, and so are metrics that the data does not define.

    Args:
        mode: the reward model's mode that PPO used (`reward.mode`).

    Returns: the content of `report.json`: times in seconds, shares from 0 to 1, and counts.

    Raises:
        UserError: the stage `evaluate` has not run.
    """
    began = time.monotonic()
    metrics, stages = read_json(folder.evaluation / "figures.json"), read_json(folder.stages)
    finished = {stage: record["seconds"] for stage, record in stages.items() if record["seconds"] is not None}
    report: dict[str, float] = {f"seconds.{stage}": seconds for stage, seconds in finished.items()}
    for policy in POLICIES:
        for name in HEADLINES:
            for decoding, suffix in (("sampled", ""), ("greedy", "_greedy")):
                if name in metrics[f"{policy}_{decoding}"]:
                    report[f"{policy}.{name}{suffix}"] = metrics[f"{policy}_{decoding}"][name]
    if folder.reward_evaluation.is_file():
        report |= _reward_metrics(read_json(folder.reward_evaluation), mode)
    if "reward" in metrics:
        report["reward.on_policy"] = metrics["reward"]["on_policy"]
        report["ppo.gold_minus_proxy"] = metrics["reward"]["gold_minus_proxy"]
    report |= _training_metrics(folder)
    if folder.best_checkpoint.is_file():
        best = read_json(folder.best_checkpoint)
        report |= {"ppo.best_step": best["step"], "ppo.best_result": best["result"]}
    report["seconds.report"] = round(time.monotonic() - began, 1)
    write_json(folder.report, report)
    return report


def _reward_metrics(evaluation: dict[str, Any], mode: str) -> dict[str, float]:
    """The reward model's metrics, without those that are null, such as flips in data without flips."""
    whole = evaluation["whole"][mode]
    metrics = {
        "reward.accuracy": whole["accuracy"],
        "reward.flip": whole["flip"]["accuracy"],
        "reward.conflict": whole["conflict"]["accuracy"],
    }
    metrics |= {f"reward.{name}": evaluation[name]["overall"]["accuracy"] for name in evaluation if name != "whole"}
    return {name: metric for name, metric in metrics.items() if metric is not None}


def _training_metrics(folder: RunFolder) -> dict[str, float]:
    if not folder.metrics.is_file():
        return {}
    steps = list(read_log(folder.metrics))
    seconds = sum(step["seconds_step"] for step in steps)
    mismatches = [step["mismatch"] for step in steps if "mismatch" in step]
    return {
        "ppo.steps": len(steps),
        "ppo.samples_per_second": sum(step["samples"] for step in steps) / seconds,
        "ppo.alarms": len(find_alarms(steps)),
    } | ({"ppo.mismatch_max": max(mismatches)} if mismatches else {})
