"""Which tier moved a score: what becomes of it without that tier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.views import active_tiers
from reward.examples import answer_row
from reward.score import Score
from reward.scorer import BATCH_TOKENS, AnyRow, Scorer


@dataclass(frozen=True, slots=True)
class Explanation:
    """A row's score beside those that its answer has without one of the tiers that say something.

    Attributes:
        moved: by tier how much it moved the `overall` logit: with it minus without it. Above 0 the answer is worth
            more because of this tier.
    """

    row: Row
    score: Score
    without: Mapping[str, Score]

    @property
    def moved(self) -> dict[str, float]:
        return {tier: self.score.overall - score.overall for tier, score in self.without.items()}

    def to_json(self) -> dict[str, Any]:
        """A JSON object: the row's id, `overall`, `probabilities` and `moved`."""
        return {
            "id": self.row.id,
            "overall": self.score.overall,
            "probabilities": self.score.probabilities,
            "moved": self.moved,
        }


def explain(
    scorer: Scorer,
    rows: Sequence[AnyRow],
    places: Sequence[str] | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Explanation]:
    """Score each row's answer as it is, and without each of its tiers.

    Args:
        places: what errors call each row, as for `Scorer.score`.

    Raises:
        UserError: as `Scorer.score`.
    """
    places = places or [f"rows[{index}]" for index in range(len(rows))]
    whole = [answer_row(row, place) for row, place in zip(rows, places, strict=True)]
    less = [(index, tier) for index, row in enumerate(whole) for tier in active_tiers(row)]
    emptied = [_without(whole[index], tier) for index, tier in less]
    named = [*places, *(places[index] for index, _ in less)]
    scores = scorer.score([*whole, *emptied], named, batch_tokens=batch_tokens)
    without: list[dict[str, Score]] = [{} for _ in whole]
    for (index, tier), score in zip(less, scores[len(whole) :], strict=True):
        without[index][tier] = score
    return [Explanation(*parts) for parts in zip(whole, scores[: len(whole)], without, strict=True)]


def _without(row: Row, tier: str) -> Row:
    return replace(row, system_info="") if tier == "system" else replace(row, user_info="")


def show(found: Explanation) -> str:
    """The explanation for reading: each tier's text, whether the answer does what it asks, and how far it moved."""
    texts = {"system": found.row.system_info, "user": found.row.user_info}
    lines = [f"{found.row.id or 'row'}: {found.row.response!r} overall {found.score.probabilities['overall']:.2f}"]
    for tier, moved in found.moved.items():
        satisfied = found.score.probabilities[tier]
        lines.append(f"  {tier:<6} satisfied {satisfied:.2f}, moved the overall logit by {moved:+.2f}: {texts[tier]!r}")
    lines.append(f"  dialog answered {found.score.probabilities['dialog']:.2f}")
    return "\n".join(lines)
