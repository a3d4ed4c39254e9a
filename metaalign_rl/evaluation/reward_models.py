"""Compare a reward model with its controls on the same pairs. A blind control sees only its own view of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.checkpoints import find_checkpoint, is_checkpoint, is_reward_model
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.views import CONTROLS, apply_view
from reward.score import Mode
from reward.training.controls import modes_of, view_of

ReportsByMode = dict[str, dict[str, Any]]  # a model's results from `reward.evaluate`, by mode

COMPARED = (  # a metric's name, its path in a report, and its meaning
    ("accuracy", "accuracy", "the chosen response has the higher score"),
    ("flips", "flip.accuracy", "right on both pairs of a flip"),
    ("tier flips", "tier_flip.accuracy", "the same, on flips that only swap the texts of the two tiers"),
    ("conflict", "conflict.accuracy", "accuracy on pairs whose tiers contradict each other"),
    ("distractor", "distractor.accuracy", "accuracy on pairs in which the text of one tier must not matter"),
    ("paraphrases, right", "consistency.accuracy", "preferences that are judged right in every wording"),
    (
        "paraphrases, alike",
        "consistency.alike",
        "preferences with the same outcome in every wording, right or wrong",
    ),
    ("over-refusal", "refusals.unwanted.preferred", "a refusal is preferred where it is the worse response; 0 is best"),
    ("refusals", "refusals.wanted.preferred", "a refusal is preferred where it is the better response"),
    ("ece", "calibration.overall.ece", "expected calibration error of the label overall; 0 is best"),
    (
        "length bias",
        "length_bias.model",
        "correlation of being preferred and being longer; best if it equals the data's",
    ),
    ("length in the data", "length_bias.gold", "the same correlation in the data: the value of a perfect model"),
)
MODE: Mode = "overall"  # in which models are compared: the only one that every model has
BREAKDOWNS = ("by_relation", "by_family", "by_length")
# Without the meta-prompt all wordings of a preference are the same text, so this control cannot fail the metric.
MEANINGLESS = {"preference_blind": ("consistency.alike",)}


def find_controls(model: Path) -> dict[str, Path]:
    """The controls of the reward model's run by name. Empty if the model is not in a run's folder."""
    folders = sorted(RunFolder(model.parent).controls.glob("*"))
    return {folder.name: folder for folder in folders if is_checkpoint(folder)}


def add_controls(model: Path, found: Mapping[str, Path], given: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """The models to compare, by name: the model under its folder's name, its run's controls, and the given ones.

    Args:
        model: folder of the reward model.
        found: the controls of its run, from `find_controls`.
        given: names and folders from the user.

    Raises:
        UserError: a name is taken, or a folder holds no reward model.
    """
    models = {model.name: model, **found}
    for given_name, path in given:
        place, control = f"--control {given_name}={path}", given_name.replace("-", "_")
        name = control if control in CONTROLS else given_name
        if name in models and models[name] != path.absolute():
            fix = "leave out this option" if name in CONTROLS else "give another name"
            raise UserError(f"{place}: expected an unused name, found {name!r}, which is {models[name]}; {fix}")
        models[name] = find_checkpoint(path)
        if not is_reward_model(models[name]):
            raise UserError(f"{place}: expected a reward model, as `metaalign-reward train` writes it, found none")
    return models


def measure(name: str, model: Path, rows: Sequence[Row], dtype: str = "float32") -> ReportsByMode:
    """Evaluate a model on the rows, in each of its modes for which it was trained.

    Args:
        name: selects the view of the rows and the modes. Controls are recognized by name and have `overall` only.
        model: folder of the model.
        dtype: type of its weights.
    """
    import reward

    scorer = reward.Scorer.from_pretrained(model, dtype=dtype)
    return reward.evaluate_modes(scorer, apply_view(rows, view_of(name)), modes_of(name), skip_untrained=True)


def compare(models: Mapping[str, ReportsByMode]) -> dict[str, dict[str, Any]]:
    """The metrics of each model, in the same mode.

    The mode is fixed: a model that were read in the best of its modes on these pairs would look better than a control,
    which has one mode only.

    Returns:
        By model, a JSON object with `mode`, the metrics of `COMPARED` by name, and each of `BREAKDOWNS` as
        `{group: accuracy}`. A metric is null if it is undefined for the data or for the model.
    """
    for name, reports in models.items():
        if MODE not in reports:
            raise UserError(f"{name}: expected a model that was trained on the label {MODE}, found none")
    return {name: _metrics(name, reports[MODE]) for name, reports in models.items()}


def counts(report: dict[str, Any]) -> dict[str, int]:
    """The number of pairs, groups of pairs or responses that each metric of `COMPARED` is computed from."""
    return {name: _count(report, path.rpartition(".")[0]) for name, path, _ in COMPARED}


def _metrics(model: str, report: dict[str, Any]) -> dict[str, Any]:
    meaningless = MEANINGLESS.get(model, ())
    metrics = {name: None if path in meaningless else _lookup(report, path) for name, path, _ in COMPARED}
    breakdowns = {key: {group: cell["accuracy"] for group, cell in report[key].items()} for key in BREAKDOWNS}
    return {"mode": MODE, **metrics, **breakdowns}


def _lookup(report: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; None if a part of the path is missing or null."""
    value: Any = report
    for key in path.split("."):
        value = (value or {}).get(key)
    return value


def _count(report: dict[str, Any], path: str) -> int:
    found = _lookup(report, path) if path else {}
    return next((found[name] for name in ("pairs", "groups", "answers") if name in (found or {})), report["pairs"])
