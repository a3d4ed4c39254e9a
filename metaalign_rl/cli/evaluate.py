"""`metaalign-rl evaluate`: evaluate any policy on rows, or a reward model on pairs.

Writes the metrics as JSON (`figures.json`), a page (`evaluation.html`) and, for a policy, its responses.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.core.checkpoints import find_checkpoint, is_checkpoint, is_reward_model, read_config
from metaalign_rl.core.dataflow import Row, Sampling
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import write_json, write_jsonl, write_text
from metaalign_rl.core.loading import require_servable
from metaalign_rl.core.prepare import prepared_policy
from metaalign_rl.core.rows import read_rows
from metaalign_rl.data.gold import judge
from metaalign_rl.evaluation.endpoint import Endpoint, TierFormat
from metaalign_rl.evaluation.gold_metrics import JudgedResponse, judge_all, summary
from metaalign_rl.evaluation.reward_models import (
    BREAKDOWNS,
    COMPARED,
    add_controls,
    compare,
    counts,
    find_controls,
    measure,
)
from metaalign_rl.evaluation.weakest_kinds import WEAK_BELOW, weakest_kinds
from metaalign_rl.pages.curves import reliability
from metaalign_rl.pages.render import render
from metaalign_rl.runtime.progress import ProgressBar, ProgressUpdate

HEADLINES = (  # a metric, its name on the page, a note
    ("following", "follows the governing preference", "mean over relations"),
    ("conflict", "resolves conflicts by tier", "strict"),
    ("distractor", "ignores distractors", "strict"),
    ("consistency", "paraphrase consistency", "followed in all wordings, if in one"),
    ("over_refusal", "over-refusal", "refusals that no tier asks for"),
)


def evaluate(
    model: str,
    data: Path,
    output: Path,
    config: Config,
    sampling: Sampling,
    *,
    served: str = "",
    tiers: TierFormat = "template",
    controls: Sequence[tuple[str, Path]] = (),
) -> dict[str, Any]:
    """Evaluate `model` on the rows of `data`, write the results to `output`, and return the metrics.

    Args:
        model: a checkpoint's folder, a run's folder (its policy), a reward model's folder, or an endpoint's URL.
        config: the settings that vLLM needs to run a checkpoint: devices, context length, dtype.
        served, tiers: see `Endpoint`.
        controls: names and folders of models to compare a reward model with, in addition to its run's controls.

    Raises:
        UserError: there is no such model, it cannot be loaded, rows cannot be judged, or a policy has controls.
    """
    rows = list(read_rows(data))
    path = None if "://" in model else find_checkpoint(Path(model))
    if path is not None and is_reward_model(path):
        return _evaluate_reward_model(path, rows, data, output, config, controls)
    if controls:
        raise UserError(f"--control {controls[0][0]}: only a reward model has controls, and {model} is a policy")
    _require_checks(rows, data)
    if path is not None:
        require_servable(path)
        name, judged = model, _judge_checkpoint(prepared_policy(path), rows, config, sampling)
    else:
        endpoint = Endpoint(model, served, tiers)
        name, judged = endpoint.model, _judge_endpoint(endpoint, rows, sampling)
    return write_report(name, data, output, judged, sampling)


def load_settings(model: str, words: list[str]) -> Config:
    """The settings of the run that a model belongs to, or else the defaults with the model's context length.

    Args:
        words: `key=value` words, which override both.

    Raises:
        UserError: a word has an unknown key or a value of the wrong type.
    """
    path = Path(model)
    runs = [folder / "config.yaml" for folder in (path, path.parent) if (folder / "config.yaml").is_file()]
    if runs:
        return loader.load_saved(Config, runs[0], words)
    shape = read_config(path) if is_checkpoint(path) else {}
    context = shape.get("max_position_embeddings")
    return loader.load(Config, None, [*([f"model.max_tokens={context}"] if context else []), *words])


# A policy.


def _require_checks(rows: Sequence[Row], data: Path) -> None:
    for row in rows:
        if judge(row, "probe").following is None:
            raise UserError(f"{data}: row {row.id!r}: no check of its governing tier; add checks.{row.tier}")


def _judge_endpoint(endpoint: Endpoint, rows: Sequence[Row], sampling: Sampling) -> list[JudgedResponse]:
    answers = []
    with ProgressBar("evaluate") as bar:
        for answer in endpoint.answer(rows, sampling):
            answers.append(answer)
            bar(ProgressUpdate(len(answers), len(rows)))
    return judge_all(rows, answers)


def _judge_checkpoint(path: Path, rows: Sequence[Row], config: Config, sampling: Sampling) -> list[JudgedResponse]:
    from metaalign_rl.runtime import ray_session

    with ray_session.connect(config):  # sets Ray's token, so nothing may import Ray before
        from metaalign_rl.pipeline.context import RunContext

        with RunContext(config) as context:
            return judge_all(rows, context.answer(path, rows, sampling))


def write_report(
    name: str, data: Path, output: Path, judged: list[JudgedResponse], sampling: Sampling
) -> dict[str, Any]:
    """Write a policy's metrics, page and responses to `output`, and return the metrics.

    Args:
        name: the policy's name on the page.
        data: the file that the rows came from.
    """
    metrics, of_empty = summary(judged), summary(judge_all([found.row for found in judged], [""] * len(judged)))
    page = render(
        "evaluation",
        name=name,
        data_file=data.name,
        rows=len(judged),
        temperature=sampling.temperature,
        headlines=HEADLINES,
        metrics=metrics,
        empty=of_empty,
        weakest=list(weakest_kinds(judged)),
        weak_below=WEAK_BELOW,
    )
    write_jsonl(output / "answers.jsonl", (found.record() for found in judged))
    _write_results(output, metrics, page)
    return metrics


# A reward model.


def _evaluate_reward_model(
    path: Path, rows: list[Row], data: Path, output: Path, config: Config, controls: Sequence[tuple[str, Path]]
) -> dict[str, Any]:
    """Measure a reward model, its run's controls and the given ones on the same pairs."""
    folders = add_controls(path, find_controls(path), controls)
    models = {name: measure(name, folder, rows, config.model.dtype) for name, folder in folders.items()}
    metrics = {"models": models, "comparison": compare(models)}
    modes = models[path.name]
    mode = config.reward.mode if config.reward.mode in modes else "overall"
    page = render(
        "reward",
        {"reliability": reliability(modes[mode])},
        name=path.name,
        data_file=data.name,
        modes=modes,
        mode=mode,
        comparison=metrics["comparison"],
        counts=counts(modes[mode]),
        compared=COMPARED,
        breakdowns=BREAKDOWNS,
    )
    _write_results(output, metrics, page)
    return metrics


def _write_results(output: Path, metrics: dict[str, Any], page: str) -> None:
    write_json(output / "figures.json", metrics)
    write_text(output / "evaluation.html", page)
