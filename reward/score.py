"""What the reward model says of one answer, and how its labels become one probability. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, expm1, inf, log, log1p, tanh
from typing import Literal, get_args

from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.errors import UserError, nearest
from metaalign_rl.core.views import active_tiers

Mode = Literal["tier", "overall", "composed"]
MODES: tuple[Mode, ...] = get_args(Mode)

LOWER_TIER_WEIGHT = 0.5  # see `combine`: above one half, obeying the higher tier better could lower the value


@dataclass(frozen=True, slots=True)
class Score:
    """Calibrated logits of one answer.

    Attributes:
        overall: what the answer is worth under the whole meta-prompt, conflicts settled by priority.
        tiers: by tier, `system`, `user` and `dialog`, whether the answer does what that tier asks. It means
            something only for a tier that says something.
    """

    overall: float
    tiers: dict[str, float]

    @property
    def probabilities(self) -> dict[str, float]:
        """The sigmoid of each of the four labels' logits."""
        return {label: 0.5 + 0.5 * tanh(logit / 2) for label, logit in self.logits.items()}

    @property
    def logits(self) -> dict[str, float]:
        """The four labels' logits in the model's order."""
        return {**self.tiers, "overall": self.overall}


def combine(score: Score | Mapping[str, float], row: Row, mode: Mode) -> float:
    """The probability, 0 to 1, that an answer is good: one number for a reward or a ranking.

    - `tier`: p_g · p_dialog, where g is the row's governing tier; p_dialog alone where that is the dialog.
    - `overall`: p_overall.
    - `composed`: p_dialog · Π_t f_t over the tiers that say something, by falling priority. The first counts
      in full, f = p. A lower one counts as far as the higher ones are satisfied, f_t = 1 - ½ · P_t · (1 -
      p_t), where P_t is the product of the higher ones' p. So disobeying a lower tier costs at most half,
      and in a conflict the answer that obeys the higher tier wins; with a weight above ½ a larger p of the
      higher tier could lower the value, and with 1 both sides of a perfect conflict would be worth 0.

    Args:
        score: a `Score`, or the probabilities of the labels that the mode reads.
        row: says which tier governs and which tiers say something.
    """
    return exp(log_combine(score, row, mode))


def log_combine(score: Score | Mapping[str, float], row: Row, mode: Mode) -> float:
    """The logarithm of `combine`; it still tells answers apart whose probabilities both round to 1."""
    check_mode(mode)
    if isinstance(score, Score):
        log_p = {label: _log_sigmoid(logit) for label, logit in score.logits.items()}
    else:
        log_p = {label: log(p) if p > 0 else -inf for label, p in score.items()}
    if mode == "overall":
        return log_p["overall"]
    if mode == "tier":
        return log_p["dialog"] + (log_p[row.tier] if row.tier != "dialog" else 0.0)
    return log_p["dialog"] + _log_composed([log_p[tier] for tier in active_tiers(row)])


def check_mode(mode: str) -> None:
    """Raise a `UserError` for an unknown mode."""
    if mode not in MODES:
        raise UserError(f"mode {mode!r}: expected one of {', '.join(MODES)}; {nearest(mode, MODES)}")


def make_score(logits: list[float]) -> Score:
    """A score from the model's four outputs, in the order of `LABELS`."""
    named = dict(zip(LABELS, logits, strict=True))
    return Score(overall=named.pop("overall"), tiers=named)


def _log_composed(log_p: list[float]) -> float:
    total, higher = 0.0, 0.0  # log of the product of factors, and of the higher tiers' p
    for position, value in enumerate(log_p):
        missing = -expm1(value)  # 1 - p, exact near p = 1
        total += value if position == 0 else log1p(-LOWER_TIER_WEIGHT * exp(higher) * missing)
        higher += value
    return total


def _log_sigmoid(logit: float) -> float:
    return min(logit, 0.0) - log1p(exp(-abs(logit)))
