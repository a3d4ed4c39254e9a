"""Shows which tier changed a score: the score with all tiers is compared with the score without each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.views import active_tiers
from reward.answers import answer_row
from reward.score import Score
from reward.scorer import BATCH_TOKENS, AnyRow, Scorer


@dataclass(frozen=True, slots=True)
class Explanation:
    """The score of a row's answer, and its scores without each of the row's active tiers.

    Attributes:
        score: with all tiers.
        without: by tier, the score without that tier.
    """

    row: Row
    score: Score
    without: Mapping[str, Score]

    @property
    def moved(self) -> dict[str, float]:
        """By tier, its effect on the `overall` logit: the logit with the tier minus the logit without it.

        Above 0, the answer scores higher because of this tier.
        """
        return {tier: self.score.overall - score.overall for tier, score in self.without.items()}

    def to_json(self) -> dict[str, Any]:
        """A JSON object: the row's `id`, `overall`, `probabilities`, `truncated` and `moved`."""
        return {
            "id": self.row.id,
            "overall": self.score.overall,
            "probabilities": self.score.probabilities,
            "truncated": self.score.truncated,
            "moved": self.moved,
        }


def explain(
    scorer: Scorer,
    rows: Sequence[AnyRow],
    places: Sequence[str] | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Explanation]:
    """Score each row's answer with all tiers, and without each of them.

    Args:
        places: the name of each row in errors; see `Scorer.score`.

    Raises:
        UserError: see `Scorer.score`.
    """
    places = places or [f"rows[{index}]" for index in range(len(rows))]
    full = [answer_row(row, place) for row, place in zip(rows, places, strict=True)]
    removals = [(index, tier) for index, row in enumerate(full) for tier in active_tiers(row)]
    reduced = [_without(full[index], tier) for index, tier in removals]
    all_places = [*places, *(places[index] for index, _ in removals)]
    scores = scorer.score([*full, *reduced], all_places, batch_tokens=batch_tokens)
    without: list[dict[str, Score]] = [{} for _ in full]
    for (index, tier), score in zip(removals, scores[len(full) :], strict=True):
        without[index][tier] = score
    return [Explanation(*parts) for parts in zip(full, scores[: len(full)], without, strict=True)]


def as_text(explanation: Explanation) -> str:
    """The explanation as text: for each tier its wording, whether the answer satisfies it, and its effect."""
    row, score = explanation.row, explanation.score
    texts = {"system": row.system_info, "user": row.user_info}
    lines = [f"{row.id or 'row'}: {row.response!r} overall {score.probabilities['overall']:.2f}"]
    for tier, moved in explanation.moved.items():
        satisfied = score.probabilities[tier]
        lines.append(f"  {tier:<6} satisfied {satisfied:.2f}, moved the overall logit by {moved:+.2f}: {texts[tier]!r}")
    lines.append(f"  dialog answered {score.probabilities['dialog']:.2f}")
    return "\n".join(lines)


def _without(row: Row, tier: str) -> Row:
    return replace(row, system_info="") if tier == "system" else replace(row, user_info="")
