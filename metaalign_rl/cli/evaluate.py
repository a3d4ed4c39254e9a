"""`metaalign-rl evaluate`: any policy on any rows, or a reward model on any pairs; JSON and a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.core.checkpoints import find_checkpoint, is_reward_model
from metaalign_rl.core.dataflow import Row, Sampling
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json, write_json, write_jsonl, write_text
from metaalign_rl.core.rows import read_rows
from metaalign_rl.data.gold import judge
from metaalign_rl.evaluation.endpoint import Endpoint, Tiers
from metaalign_rl.evaluation.failures import FAILING, failing_kinds
from metaalign_rl.evaluation.gold_metrics import JudgedResponse, judge_all, summary
from metaalign_rl.evaluation.reward_models import COMPARED, CUTS, add_controls, compare, counts, find_controls, measure
from metaalign_rl.pages.curves import reliability
from metaalign_rl.pages.render import render
from metaalign_rl.runtime.progress import ProgressBar, ProgressUpdate

SHOWN = (  # figure, its name on the page, what to know of it
    ("following", "follows what governs", "mean over relations"),
    ("conflict", "settles conflicts by tier", "strict"),
    ("distractor", "ignores distractors", "strict"),
    ("consistency", "paraphrase consistency", "followed in all wordings, if in one"),
    ("over_refusal", "over-refusal", "refusals that nobody asked for"),
)


def evaluate(
    model: str,
    data: Path,
    output: Path,
    config: Config,
    sampling: Sampling,
    *,
    served: str = "",
    tiers: Tiers = "template",
    controls: Sequence[tuple[str, Path]] = (),
) -> dict[str, Any]:
    """Evaluate `model` on the rows of `data` and write `figures.json`, `evaluation.html` and the answers to `output`.

    Args:
        model: a checkpoint's folder, a run's folder (its policy), a reward model's folder, or an endpoint's URL.
        config: what vLLM needs to know to run a checkpoint: devices, context, dtype.
        served, tiers: see `Endpoint`.
        controls: names and folders of models to set beside a reward model and its run's controls.

    Returns: what it wrote to `figures.json`.

    Raises:
        UserError: no such model, rows that cannot be judged, or controls for a policy.
    """
    rows = list(read_rows(data))
    path = None if "://" in model else find_checkpoint(Path(model))
    if path is not None and is_reward_model(path):
        return _evaluate_reward(path, rows, data, output, config, controls)
    if controls:
        raise UserError(f"--control {controls[0][0]}: only a reward model has controls, and {model} is a policy")
    if path is None:
        endpoint = Endpoint(model, served, tiers)
        return write_report(endpoint.model, data, output, _ask(endpoint, _judgeable(rows, data), sampling), sampling)
    return write_report(str(model), data, output, _roll_out(path, _judgeable(rows, data), config, sampling), sampling)


def load_settings(model: str, words: list[str]) -> Config:
    """The settings of the run that a model belongs to, else the defaults with the model's own context; `words` win.

    Raises:
        UserError: an unknown or ill-typed setting.
    """
    path = Path(model)
    runs = [folder / "config.yaml" for folder in (path, path.parent) if (folder / "config.yaml").is_file()]
    if runs:
        return loader.load_saved(Config, runs[0], words)
    shape = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    context = shape.get("max_position_embeddings")
    return loader.load(Config, None, [*([f"model.max_tokens={context}"] if context else []), *words])


def _judgeable(rows: Sequence[Row], data: Path) -> Sequence[Row]:
    for row in rows:
        if judge(row, "probe").following is None:
            raise UserError(
                f"{data}: row {row.id!r}: no check of its governing tier, checks.{row.tier}, to judge an answer by"
            )
    return rows


def _ask(endpoint: Endpoint, rows: Sequence[Row], sampling: Sampling) -> list[JudgedResponse]:
    answers = []
    with ProgressBar("evaluate") as bar:
        for answer in endpoint.answer(rows, sampling):
            answers.append(answer)
            bar(ProgressUpdate(len(answers), len(rows)))
    return judge_all(rows, answers)


def _roll_out(path: Path, rows: Sequence[Row], config: Config, sampling: Sampling) -> list[JudgedResponse]:
    from metaalign_rl.pipeline.context import RunContext
    from metaalign_rl.runtime import ray_session

    with ray_session.connect(config), RunContext(config) as context:
        return judge_all(rows, context.answer(path, rows, sampling))


def write_report(
    name: str, data: Path, output: Path, judged: list[JudgedResponse], sampling: Sampling
) -> dict[str, Any]:
    """Write a policy's figures, its page and its answers to `output`; the figures.

    Args:
        name: what the page calls the policy. data: the file of the rows.
    """
    figures, empty = summary(judged), summary(judge_all([found.row for found in judged], [""] * len(judged)))
    page = render(
        "evaluation",
        name=name,
        data_file=data.name,
        rows=len(judged),
        temperature=sampling.temperature,
        headlines=SHOWN,
        figures=figures,
        empty=empty,
        failures=list(failing_kinds(judged)),
        threshold=FAILING,
    )
    write_jsonl(output / "answers.jsonl", (found.record() for found in judged))
    write_json(output / "figures.json", figures)
    write_text(output / "evaluation.html", page)
    return figures


def _evaluate_reward(
    path: Path, rows: list[Row], data: Path, output: Path, config: Config, controls: Sequence[tuple[str, Path]]
) -> dict[str, Any]:
    """A reward model's reports by mode, beside those of its run's controls and of the given ones."""
    folders = add_controls(path, find_controls(path), controls)
    models = {name: measure(name, folder, rows, config.model.dtype) for name, folder in folders.items()}
    figures = {"models": models, "comparison": compare(models)}
    modes, mode = models[path.name], config.reward.mode
    shown = mode if mode in modes else "overall"
    page = render(
        "reward",
        {"reliability": reliability(modes[shown])},
        name=path.name,
        data_file=data.name,
        modes=modes,
        mode=shown,
        comparison=figures["comparison"],
        counts=counts(modes[shown]),
        compared=COMPARED,
        cuts=CUTS,
    )
    write_json(output / "figures.json", figures)
    write_text(output / "evaluation.html", page)
    return figures
