"""`report.html`: a run on one page."""

from itertools import groupby
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.files import read_json, read_jsonl, write_text
from metaalign_rl.core.rows import read_rows
from metaalign_rl.data.gold import Verdict
from metaalign_rl.evaluation.gold_metrics import JudgedResponse
from metaalign_rl.evaluation.weakest_kinds import WEAK_BELOW, weakest_kinds
from metaalign_rl.pages.curves import reliability
from metaalign_rl.pages.render import render
from metaalign_rl.report.rollouts import write_browser
from metaalign_rl.report.training_curves import TrainingSummary, read_training


def write(folder: RunFolder, mode: str) -> None:
    """Write the page from the stages' files and `report.json`. The part of a stage that did not run is left out.

    Args:
        mode: the reward model's mode that PPO used (`reward.mode`).

    Raises:
        UserError: the stage `evaluate` has not run, or `report.json` is missing.
    """
    metrics = read_json(folder.evaluation / "figures.json")
    reward = read_json(folder.reward_evaluation) if folder.reward_evaluation.is_file() else None
    training, rollouts = read_training(folder), write_browser(folder)
    curves = reliability(reward["whole"][mode]) if reward else {}
    page = render(
        "run",
        script_data={**_chart_data(training), "reliability": curves, "rollouts": rollouts},
        name=folder.root.name,
        report=read_json(folder.report),
        metrics=metrics,
        showcase=_by_question(metrics["showcase"]),
        weakest=list(weakest_kinds(_judged_responses(folder))),
        weak_below=WEAK_BELOW,
        splits=_split_meanings(metrics["source"]),
        reward=reward,
        mode=mode,
        training=training,
        best=read_json(folder.best_checkpoint) if folder.best_checkpoint.is_file() else None,
        rollouts=rollouts,
        config=folder.config.read_text(encoding="utf-8") if folder.config.is_file() else "",
    )
    write_text(folder.page, page)


def _chart_data(training: TrainingSummary | None) -> dict[str, Any]:
    """The data of the training charts."""
    if training is None:
        return {"training": {}, "alarms": [], "faults": []}
    alarms = [{"kind": alarm.kind, "step": alarm.step} for alarm in training.alarms]
    faults = sorted({fault["step"] for fault in training.faults})
    return {"training": training.columns, "alarms": alarms, "faults": faults}


def _by_question(showcase: list[dict[str, str]]) -> list[tuple[str, list[dict[str, str]]]]:
    """Each question with its records, one per meta-prompt."""
    return [(question, list(records)) for question, records in groupby(showcase, lambda record: record["question"])]


def _judged_responses(folder: RunFolder) -> list[JudgedResponse]:
    """The trained policy's sampled responses to the held-out rows."""
    rows = {row.id: row for row in read_rows(folder.rows("held_out_prompts"))}
    return [_judged(rows, record) for _, record in read_jsonl(folder.evaluation / "ppo_sampled.jsonl")]


def _judged(rows: dict[str, Row], record: dict[str, Any]) -> JudgedResponse:
    verdict = Verdict(**{name: record[name] for name in ("passes", "following", "strict")})
    return JudgedResponse(rows[record["id"]], record["answer"], verdict)


def _split_meanings(source: str) -> dict[str, str]:
    """The meaning of each held-out split. Only the built-in world has splits."""
    if source != "world":
        return {}
    from metaalign_rl.data.world.scenarios import SPLIT_MEANINGS

    return SPLIT_MEANINGS
