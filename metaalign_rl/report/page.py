"""`report.html`: one page about a run."""

from itertools import groupby
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.files import read_json, read_jsonl, write_text
from metaalign_rl.core.rows import read_rows
from metaalign_rl.data.gold import Verdict
from metaalign_rl.evaluation.failures import FAILING, failing_kinds
from metaalign_rl.evaluation.gold_metrics import JudgedResponse
from metaalign_rl.pages.curves import reliability
from metaalign_rl.pages.render import render
from metaalign_rl.report.rollouts import write_browser
from metaalign_rl.report.training_curves import Training, read_training


def build(folder: RunFolder, mode: str) -> None:
    """Write the page from the stages' files; a part whose stage did not run is left out.

    Args:
        mode: which of the reward model's scores PPO used.
    """
    figures = read_json(folder.evaluation / "figures.json")
    reward = read_json(folder.reward_evaluation) if folder.reward_evaluation.is_file() else None
    training, rollouts = read_training(folder), write_browser(folder)
    curves = reliability(reward["whole"][mode]) if reward else {}
    page = render(
        "run",
        script_data={**_drawn(training), "reliability": curves, "rollouts": rollouts},
        name=folder.root.name,
        report=read_json(folder.report),
        figures=figures,
        matrix=_matrix(figures["showcase"]),
        failures=list(failing_kinds(_answers(folder))),
        threshold=FAILING,
        splits=_split_meanings(figures["source"]),
        reward=reward,
        mode=mode,
        training=training,
        rollouts=rollouts,
        config=folder.config.read_text(encoding="utf-8") if folder.config.is_file() else "",
    )
    write_text(folder.page, page)


def _drawn(training: Training | None) -> dict[str, Any]:
    """What the page's charts draw of PPO."""
    if training is None:
        return {"training": {}, "alarms": [], "faults": []}
    alarms = [{"kind": alarm.kind, "step": alarm.step} for alarm in training.alarms]
    faults = sorted({fault["step"] for fault in training.faults})
    return {"training": training.columns, "alarms": alarms, "faults": faults}


def _matrix(showcase: list[dict[str, str]]) -> list[tuple[str, list[dict[str, str]]]]:
    """Each question with what was answered to it under every meta-prompt."""
    return [(question, list(records)) for question, records in groupby(showcase, lambda record: record["question"])]


def _answers(folder: RunFolder) -> list[JudgedResponse]:
    """What the trained policy answered to the held-out rows, sampled."""
    rows = {row.id: row for row in read_rows(folder.rows("held_out_prompts"))}
    return [_judged(rows, record) for _, record in read_jsonl(folder.evaluation / "ppo_sampled.jsonl")]


def _judged(rows: dict[str, Row], record: dict[str, Any]) -> JudgedResponse:
    verdict = Verdict(**{name: record[name] for name in ("passes", "following", "strict")})
    return JudgedResponse(rows[record["id"]], record["answer"], verdict)


def _split_meanings(source: str) -> dict[str, str]:
    if source != "world":
        return {}
    from metaalign_rl.data.world.scenarios import SPLIT_MEANINGS

    return SPLIT_MEANINGS
