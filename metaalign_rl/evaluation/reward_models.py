"""A reward model beside its controls: all on the same pairs, each seeing of them what it was trained to see."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.checkpoints import find_checkpoint, is_checkpoint, is_reward_model
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.views import CONTROLS, apply_view
from reward.training.controls import modes_of, view_of

Modes = dict[str, dict[str, Any]]  # a model's reports, `reward.evaluate`'s, by mode

COMPARED = (  # the name of a figure, where it stands in a report, and what it means
    ("accuracy", "accuracy", "the better answer has the higher score"),
    ("flips", "flip.accuracy", "right both ways"),
    ("tier flips", "tier_flip.accuracy", "right both ways, of flips that swap the two tiers' texts alone"),
    ("conflict", "conflict.accuracy", "the pairs in which the tiers contradict each other"),
    ("distractor", "distractor.accuracy", "the pairs in which one tier's text must not matter"),
    ("paraphrases, right", "consistency.accuracy", "wishes judged rightly in every wording"),
    ("paraphrases, alike", "consistency.alike", "wishes judged alike in every wording, rightly or not"),
    ("over-refusal", "refusals.unwanted.preferred", "a refusal preferred where it is the worse answer: 0 is best"),
    ("refusals", "refusals.wanted.preferred", "a refusal preferred where it is the better answer"),
    ("ece", "calibration.overall.ece", "expected calibration error of the label overall: 0 is best"),
    ("length bias", "length_bias.model", "correlation of being preferred and being longer, to be as the data's"),
    ("length in the data", "length_bias.gold", "the same of the better answers: what a perfect model has"),
)
CUTS = ("by_relation", "by_family", "by_length")
# Without the meta-prompt, a preference's wordings are one and the same text: alike is nothing that it could fail.
IMPOSSIBLE = {"preference_blind": ("consistency.alike",)}


def find_controls(model: Path) -> dict[str, Path]:
    """The controls of the run that a reward model belongs to, by name; none where it belongs to none."""
    folders = sorted(RunFolder(model.parent).controls.glob("*"))
    return {folder.name: folder for folder in folders if is_checkpoint(folder)}


def add_controls(model: Path, found: Mapping[str, Path], given: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """A model, by its folder's name, the controls of its run, and those that the user gives beside them.

    Raises:
        UserError: a name that is taken, or a folder without a reward model.
    """
    models = {model.name: model, **found}
    for given_name, path in given:
        place, control = f"--control {given_name}={path}", given_name.replace("-", "_")
        name = control if control in CONTROLS else given_name
        if name in models and models[name] != path.absolute():
            remedy = "leave it out" if name in CONTROLS else "give another name"
            raise UserError(f"{place}: {name!r} is {models[name]} already; {remedy}")
        models[name] = find_checkpoint(path)
        if not is_reward_model(models[name]):
            raise UserError(f"{place}: not a reward model; give one that `metaalign-reward train` made")
    return models


def measure(name: str, model: Path, rows: Sequence[Row], dtype: str = "float32") -> Modes:
    """A model's reports on the rows. A control is known by its name: it is shown its view, and read in `overall`."""
    import reward

    scorer = reward.Scorer.from_pretrained(model, dtype=dtype)
    return reward.evaluate_modes(scorer, apply_view(rows, view_of(name)), modes_of(name))


def compare(models: Mapping[str, Modes]) -> dict[str, dict[str, Any]]:
    """By model, the figures of the `mode` in which it is most accurate: `COMPARED`'s by name, and each of `CUTS` as
    `{group: accuracy}`. What a model cannot have is null."""
    return {name: _figures(name, reports) for name, reports in models.items()}


def counts(report: dict[str, Any]) -> dict[str, int]:
    """How many pairs, groups of pairs or answers each of `COMPARED`'s figures is over."""
    return {figure: _count(report, place.rpartition(".")[0]) for figure, place, _ in COMPARED}


def _figures(name: str, reports: Modes) -> dict[str, Any]:
    mode = max(reports, key=lambda mode: reports[mode]["accuracy"])
    report, impossible = reports[mode], IMPOSSIBLE.get(name, ())
    found = {figure: None if place in impossible else _at(report, place) for figure, place, _ in COMPARED}
    return {
        "mode": mode,
        **found,
        **{cut: {group: value["accuracy"] for group, value in report[cut].items()} for cut in CUTS},
    }


def _at(report: dict[str, Any], place: str) -> Any:
    value: Any = report
    for key in place.split("."):
        value = (value or {}).get(key)
    return value


def _count(report: dict[str, Any], group: str) -> int:
    found = _at(report, group) if group else {}
    return next((found[name] for name in ("pairs", "groups", "answers") if name in (found or {})), report["pairs"])
