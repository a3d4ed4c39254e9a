"""The temperatures of a trained reward model: rows held out to fit them, and the fit itself."""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from random import Random

import torch

from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.errors import UserError
from reward.answers import labelled_answers
from reward.evaluation.calibration import fit_temperature
from reward.model import fold_temperatures
from reward.scorer import Scorer
from reward.training.config import RewardTraining


@dataclass(frozen=True, slots=True)
class Calibration:
    """The result of `calibrate`.

    Attributes:
        temperature: by label; 1 if it was not fitted.
        calibrated: the labels whose temperature was fitted.
    """

    temperature: dict[str, float]
    calibrated: tuple[str, ...]


def hold_out(rows: Sequence[Row], config: RewardTraining) -> tuple[list[Row], list[Row]]:
    """Split off the rows for the temperatures: about `config.calibration_share` of the labelled rows, at random.

    Rows with the same prompt (tiers and dialog) stay together, and so do the rows of a flip. So no held-out row has a
    prompt that is trained on: a model is too sure of answers to prompts that it knows. Rows of a held-out prompt that
    have no labels are not used.

    Returns:
        The rows to train on, and the labelled rows that are held out.

    Raises:
        UserError: no row is left to train on.
    """
    kept: list[Row] = []
    held_out: list[Row] = []
    for group in connected([[_prompt(row), row.tags.get("flip", row.id)] for row in rows]):
        members = [rows[index] for index in group]
        labelled = [row for row in members if row.labels]
        key = min(row.tags.get("flip", row.id) for row in members)
        if labelled and Random(f"{config.seed} {key}").random() < config.calibration_share:
            held_out += labelled
        else:
            kept += members
    if not kept:
        raise UserError(
            f"rows: expected at least one to train on, found none besides {len(rows)} held out; "
            "give more rows, or lower calibration_share"
        )
    place = {id(row): index for index, row in enumerate(rows)}
    return sorted(kept, key=lambda row: place[id(row)]), held_out


def connected(keys: Sequence[Iterable[str]]) -> list[list[int]]:
    """Group items that share a key, directly or through other items.

    Args:
        keys: of each item.

    Returns:
        The items' indices by group.
    """
    parent = list(range(len(keys)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[int, str], int] = {}
    for index, names in enumerate(keys):
        for kind, name in enumerate(names):
            parent[root(index)] = root(first.setdefault((kind, name), index))
    groups: dict[int, list[int]] = {}
    for index in range(len(keys)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def calibrate(scorer: Scorer, rows: Sequence[Row], trained_labels: Collection[str] = LABELS) -> Calibration:
    """Fit the temperature of each trained label on the rows' labelled answers, and fold them into the scorer's model.

    A label is left at temperature 1 if it is not both true and false among the answers.
    """
    answers = [answer for row in rows for answer in labelled_answers(row)]
    scorer.model.eval()
    logits = scorer.logits([scorer.encode(row, f"row {row.id!r}") for row, _ in answers])
    temperature = dict.fromkeys(LABELS, 1.0)
    calibrated = []
    for index, label in enumerate(LABELS):
        truths = torch.tensor([float(labels[label]) if label in labels else torch.nan for _, labels in answers])
        if label in trained_labels and {0.0, 1.0} <= set(truths.tolist()):
            temperature[label] = fit_temperature(logits[:, index], truths)
            calibrated.append(label)
    fold_temperatures(scorer.model, temperature)
    return Calibration(temperature, tuple(calibrated))


def _prompt(row: Row) -> str:
    return json.dumps([row.system_info, row.user_info, row.messages])
