"""The temperatures of a trained reward model: rows held out to fit them, and the fit itself."""

from collections.abc import Collection, Sequence
from random import Random

import torch

from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.errors import UserError
from reward.answers import labelled_answers
from reward.evaluation.calibration import fit_temperature
from reward.model import fold_temperatures
from reward.scorer import Scorer
from reward.training.config import RewardTraining


def hold_out(rows: Sequence[Row], config: RewardTraining) -> tuple[list[Row], list[Row]]:
    """Split off the rows for the temperatures: `config.calibration_share` of the labelled rows, at random.

    The rows of a flip stay together.

    Returns:
        The rows to train on, and the labelled rows that are held out.

    Raises:
        UserError: no row is left to train on.
    """

    def is_held_out(row: Row) -> bool:
        key = row.tags.get("flip", row.id)
        return bool(row.labels) and Random(f"{config.seed} {key}").random() < config.calibration_share

    kept = [row for row in rows if not is_held_out(row)]
    if not kept:
        raise UserError(
            f"rows: expected at least one to train on, found none besides {len(rows)} held out; "
            "give more rows, or lower calibration_share"
        )
    return kept, [row for row in rows if is_held_out(row)]


def calibrate(scorer: Scorer, rows: Sequence[Row], trained_labels: Collection[str] = LABELS) -> dict[str, float]:
    """Fit the temperature of each trained label on the rows' labelled answers, and fold them into the scorer's model.

    Returns:
        The temperature of each label. It is 1 for other labels, and for labels that are not both true and false among
        the answers.
    """
    answers = [answer for row in rows for answer in labelled_answers(row)]
    scorer.model.eval()
    logits = scorer.logits([scorer.encode(row, f"row {row.id!r}") for row, _ in answers])
    temperatures = dict.fromkeys(LABELS, 1.0)
    for label in trained_labels:
        index = LABELS.index(label)
        truths = torch.tensor([float(labels[label]) if label in labels else torch.nan for _, labels in answers])
        temperatures[label] = fit_temperature(logits[:, index], truths)
    fold_temperatures(scorer.model, temperatures)
    return temperatures
