"""The reward worker: scores answers with a reward model, the rows' checks, a user's function, or a mix of them."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from metaalign_rl.core.dataflow import Reward, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.views import View, apply_view
from metaalign_rl.data.gold import judge
from metaalign_rl.scoring.user_function import RewardFunction
from reward.score import Mode, Score, combine

if TYPE_CHECKING:
    from reward import Scorer
    from reward.serving.client import RemoteScorer


class RewardWorker:
    """A Ray actor round `reward.Scorer` and the gold checks; it reads whole rows, not only text."""

    def __init__(
        self,
        model: Path | str | None,
        mode: Mode,
        model_weight: float,
        checks_weight: float,
        view: View = "whole",
        dtype: str = "float32",
        function: str | None = None,
        function_weight: float = 0.0,
    ) -> None:
        """Load the reward model and the user's function, where they have a weight.

        Args:
            model: the reward model's folder, or the URL of a server that scores.
            dtype: of the reward model's weights.
            function: the user's, as `path/to/file.py:name`.

        Raises:
            UserError: a weight without its source, or no weight at all.
        """
        if model_weight > 0 and model is None:
            raise UserError(
                "ppo.model_weight: there is no reward model; run the stage reward, or give reward.path or reward.url"
            )
        if function_weight > 0 and function is None:
            raise UserError(
                "ppo.function_weight: there is no function; give one as reward.function=path/to/file.py:name"
            )
        if not model_weight + checks_weight + function_weight > 0:
            raise UserError(
                "ppo.model_weight, ppo.checks_weight and ppo.function_weight are all 0, which leaves no reward"
            )
        self._mode, self._view = mode, view
        self._weights = (model_weight, checks_weight, function_weight)
        self._scorer = _load(model, dtype) if model is not None and model_weight > 0 else None
        self._function = RewardFunction(function) if function is not None and function_weight > 0 else None

    def score(self, rows: list[Row], answers: list[str]) -> list[Reward]:
        """The reward of each answer to its row.

        Raises:
            UserError: a row cannot be scored; a failure is never a number.
        """
        scores = self._scores(rows, answers)
        own = self._function(rows, answers) if self._function else [0.0] * len(rows)
        return [
            self._mix(row, answer, *found, value)
            for row, answer, found, value in zip(rows, answers, scores, own, strict=True)
        ]

    def _scores(self, rows: list[Row], answers: list[str]) -> list[tuple[Score | None, float | None]]:
        """Each answer's score, and the probability that the mode makes of it."""
        if self._scorer is None:
            return [(None, None)] * len(rows)
        seen = apply_view(
            [replace(row, response=answer) for row, answer in zip(rows, answers, strict=True)], self._view
        )
        return [(s, combine(s, row, self._mode)) for s, row in zip(self._scorer.score(seen), seen, strict=True)]

    def _mix(self, row: Row, answer: str, score: Score | None, proxy: float | None, own: float) -> Reward:
        checks_weight = self._weights[1]
        verdict = judge(row, answer)
        gold = verdict.following
        if checks_weight > 0 and gold is None:
            raise UserError(
                f"row {row.id!r}: ppo.checks_weight needs a check of the governing tier, and checks.{row.tier} "
                "has none: give the row one, or set ppo.checks_weight=0"
            )
        parts = (proxy or 0.0, float(gold or False), own)
        value = sum(weight * part for weight, part in zip(self._weights, parts, strict=True)) / sum(self._weights)
        return Reward(value, proxy, gold, score.probabilities if score else {}, verdict.passes)


def _load(model: Path | str, dtype: str) -> "Scorer | RemoteScorer":
    if isinstance(model, str):
        from reward.serving.client import RemoteScorer

        return RemoteScorer(model)
    from reward import Scorer

    return Scorer.from_pretrained(model, dtype=dtype)
