"""`report.json`: the figures of a run, one flat object, from the stages' files."""

import time
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.files import read_json, read_log, write_json
from metaalign_rl.monitoring.alarms import episodes

POLICIES = {"sft": "before PPO", "ppo": "after PPO"}
HEADLINES = ("following", "conflict", "distractor")


def build(folder: RunFolder, mode: str) -> dict[str, float]:
    """Write `report.json`, one flat object; the keys of a stage that did not run are missing.

    Args:
        mode: which of the reward model's scores PPO used.
    """
    began = time.monotonic()
    figures, stages = read_json(folder.evaluation / "figures.json"), read_json(folder.stages)
    finished = {stage: record["seconds"] for stage, record in stages.items() if record["seconds"] is not None}
    report: dict[str, float] = {f"seconds.{stage}": seconds for stage, seconds in finished.items()}
    for policy in POLICIES:
        for name in HEADLINES:
            for decoding, suffix in (("sampled", ""), ("greedy", "_greedy")):
                if name in figures[f"{policy}_{decoding}"]:
                    report[f"{policy}.{name}{suffix}"] = figures[f"{policy}_{decoding}"][name]
    if folder.reward_evaluation.is_file():
        report |= _reward(read_json(folder.reward_evaluation), mode)
    if "reward" in figures:
        report["reward.on_policy"] = figures["reward"]["on_policy"]
        report["ppo.gold_minus_proxy"] = figures["reward"]["gold_minus_proxy"]
    report |= _training(folder)
    report["seconds.report"] = round(time.monotonic() - began, 1)
    write_json(folder.report, report)
    return report


def _reward(evaluation: dict[str, Any], mode: str) -> dict[str, float]:
    """The reward model's figures; one over nothing, such as flips in data without any, is left out."""
    whole = evaluation["whole"][mode]
    figures = {
        "reward.accuracy": whole["accuracy"],
        "reward.flip": whole["flip"]["accuracy"],
        "reward.conflict": whole["conflict"]["accuracy"],
    }
    figures |= {f"reward.{name}": evaluation[name]["overall"]["accuracy"] for name in evaluation if name != "whole"}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _training(folder: RunFolder) -> dict[str, float]:
    if not folder.metrics.is_file():
        return {}
    steps = list(read_log(folder.metrics))
    seconds = sum(step["seconds_step"] for step in steps)
    return {
        "ppo.steps": len(steps),
        "ppo.samples_per_second": sum(step["samples"] for step in steps) / seconds,
        "ppo.mismatch_max": max(step["mismatch"] for step in steps),
        "ppo.alarms": len(episodes(steps)),
    }
