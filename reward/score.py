"""The reward model's score of one answer, and how to combine its labels. Imports no heavy packages."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import exp, expm1, inf, log, log1p, tanh
from typing import Literal, get_args

from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.errors import UserError, nearest
from metaalign_rl.core.views import active_tiers

Mode = Literal["tier", "overall", "composed"]
MODES: tuple[Mode, ...] = get_args(Mode)

GOOD = 0.5  # the probability from which an answer counts as good
LOWER_TIER_WEIGHT = 0.5  # with more, obeying the higher tier better could lower the value; see `combine`


@dataclass(frozen=True, slots=True)
class Score:
    """The calibrated logits of one answer.

    Attributes:
        overall: whether the answer is good under all tiers; in a conflict the higher tier counts.
        tiers: whether the answer does what each of `system`, `user` and `dialog` asks. The logit of an empty tier has
            no meaning.
        truncated: the dialog was too long for the model, and its beginning was not read.
        untrained: labels that the model was not trained on. Their logits have no meaning.
    """

    overall: float
    tiers: dict[str, float]
    truncated: bool = False
    untrained: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def probabilities(self) -> dict[str, float]:
        """The sigmoids of the four logits, by label."""
        return {label: 0.5 + 0.5 * tanh(logit / 2) for label, logit in self.logits.items()}

    @property
    def logits(self) -> dict[str, float]:
        """The four logits by label, in the order of the model's outputs."""
        return {**self.tiers, "overall": self.overall}


def combine(score: Score | Mapping[str, float], row: Row, mode: Mode) -> float:
    """The probability, from 0 to 1, that an answer is good: one number for a reward or a ranking.

    The modes:

    - `tier`: p_g · p_dialog, where g is the row's governing tier; p_dialog if that is the dialog.
    - `overall`: p_overall.
    - `composed`: p_dialog · Π_t f_t over the active tiers, from the highest priority to the lowest. The first tier
      counts fully: f = p. A lower tier counts less if the higher ones are not satisfied: f_t = 1 - ½ · P_t · (1 - p_t),
      where P_t is the product of the higher tiers' p. Disobeying a lower tier therefore costs at most half, and in a
      conflict the answer that obeys the higher tier wins. With a weight above ½, a larger p of the higher tier could
      lower the value. With a weight of 1, both answers to a perfect conflict would be worth 0.

    Args:
        score: a `Score`, or the probabilities of the labels that the mode reads.
        row: gives the governing tier and the active tiers.

    Raises:
        UserError: the mode is unknown, it reads a label that the model was not trained on, or it is `tier` and the
            row's governing tier is empty.
    """
    return exp(log_combine(score, row, mode))


def log_combine(score: Score | Mapping[str, float], row: Row, mode: Mode) -> float:
    """The logarithm of `combine`. It still ranks answers whose probabilities both round to 1."""
    labels = labels_read(row, mode)
    if isinstance(score, Score):
        require_trained(mode, labels, score.untrained)
        log_p = {label: _log_sigmoid(logit) for label, logit in score.logits.items()}
    else:
        log_p = {label: log(p) if p > 0 else -inf for label, p in score.items()}
    if mode == "composed":
        return log_p["dialog"] + _log_composed([log_p[tier] for tier in active_tiers(row)])
    return sum(log_p[label] for label in labels)


def labels_read(row: Row, mode: Mode) -> tuple[str, ...]:
    """The labels that a mode reads for a row.

    Raises:
        UserError: the mode is unknown, or it is `tier` and the row's governing tier is empty.
    """
    check_mode(mode)
    if mode == "overall":
        return ("overall",)
    if mode == "composed":
        return ("dialog", *active_tiers(row))
    if row.tier == "dialog":
        return ("dialog",)
    if row.tier not in active_tiers(row):
        raise UserError(
            f"row {row.id!r}: mode 'tier' reads the governing tier, which is {row.tier!r}: expected a text in "
            f"{row.tier}_info, found none; correct the row's tier, or use mode overall"
        )
    return ("dialog", row.tier)


def require_trained(mode: Mode, labels: Iterable[str], untrained: frozenset[str]) -> None:
    """Raise a `UserError` if a mode reads a label that the model was not trained on."""
    found = untrained.intersection(labels)
    missing = [label for label in LABELS if label in found]
    if missing:
        raise UserError(
            f"mode {mode!r}: it reads {', '.join(missing)}, but the reward model's training data had no such labels; "
            "use another mode, or train with these labels"
        )


def check_mode(mode: str) -> None:
    """Raise a `UserError` if the mode is unknown."""
    if mode not in MODES:
        raise UserError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}; {nearest(mode, MODES)}")


def make_score(logits: list[float], *, truncated: bool = False, untrained: frozenset[str] = frozenset()) -> Score:
    """A score from the model's four outputs, in the order of `LABELS`."""
    by_label = dict(zip(LABELS, logits, strict=True))
    return Score(by_label.pop("overall"), by_label, truncated, untrained)


def _log_composed(log_p: list[float]) -> float:
    total, higher = 0.0, 0.0  # logarithms of Π f so far, and of P, the product of the higher tiers' p
    for position, value in enumerate(log_p):
        missing = -expm1(value)  # 1 - p, exact near p = 1
        total += value if position == 0 else log1p(-LOWER_TIER_WEIGHT * exp(higher) * missing)
        higher += value
    return total


def _log_sigmoid(logit: float) -> float:
    return min(logit, 0.0) - log1p(exp(-abs(logit)))
