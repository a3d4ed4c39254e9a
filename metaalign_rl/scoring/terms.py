"""The terms of the reward: the reward model, the rows' checks, and a user's function.

A term gives each response a value; the reward is the weighted mean of the terms. To add one, write a class with
`weight` and `score`, and add it to `make_terms`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from metaalign_rl.core.dataflow import Ending, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.views import View, apply_view
from metaalign_rl.data.gold import Verdict
from metaalign_rl.scoring.shaping import Shaping
from metaalign_rl.scoring.user_function import UserFunction
from reward.score import Mode, combine

if TYPE_CHECKING:
    from reward import Scorer
    from reward.serving.client import RemoteScorer


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """The parts of a reward.

    Attributes:
        model: the reward model's folder, or the URL of a scoring server; None: none.
        mode: which of the reward model's probabilities is its value; see `reward.score.combine`.
        view: the part of a row that the reward model sees.
        dtype: type of the reward model's weights.
        function: a user's function, as `path/to/file.py:name`; None: none.
        model_weight, checks_weight, function_weight: weights of the terms; a term with weight 0 is left out.
        shaping: the clip and the penalties.
    """

    model: Path | str | None = None
    mode: Mode = "overall"
    view: View = "whole"
    dtype: str = "float32"
    function: str | None = None
    model_weight: float = 0.0
    checks_weight: float = 0.0
    function_weight: float = 0.0
    shaping: Shaping = field(default_factory=Shaping)


@dataclass(frozen=True, slots=True)
class Responses:
    """Responses to rows, and what is known of them. All sequences have one entry per response.

    Attributes:
        verdicts: the verdicts of the rows' checks on the responses.
        endings: how the responses ended; None if this is unknown.
    """

    rows: Sequence[Row]
    texts: Sequence[str]
    verdicts: Sequence[Verdict]
    endings: Sequence[Ending] | None


@dataclass(frozen=True, slots=True)
class TermScore:
    """One term's score for one response.

    Attributes:
        value: higher is better. The model's and the checks' are from 0 to 1.
        probabilities: the reward model's probabilities by label; empty for other terms.
    """

    value: float
    probabilities: Mapping[str, float] = field(default_factory=dict)


class RewardTerm(Protocol):
    """One term of the reward."""

    weight: float

    def score(self, given: Responses) -> list[TermScore]:
        """The scores of responses, in their order.

        Raises:
            UserError: a row cannot be scored. A failure is never a number.
        """


class ModelTerm:
    """The probability that a response is good, by the reward model."""

    def __init__(self, spec: RewardSpec) -> None:
        """Load the model, or connect to the server."""
        assert spec.model is not None
        self.weight = spec.model_weight
        self._mode, self._view = spec.mode, spec.view
        self._scorer, self._is_remote = load_scorer(spec.model, spec.dtype), isinstance(spec.model, str)

    def score(self, given: Responses) -> list[TermScore]:
        """See `RewardTerm`."""
        answered = [replace(row, response=text) for row, text in zip(given.rows, given.texts, strict=True)]
        seen = apply_view(answered, self._view)
        if self._is_remote:  # a server may read how a response ended; our reward model does not
            scores = cast("RemoteScorer", self._scorer).score(seen, endings=given.endings)
        else:
            scores = self._scorer.score(seen)
        return [TermScore(combine(s, row, self._mode), s.probabilities) for s, row in zip(scores, seen, strict=True)]


class ChecksTerm:
    """1 if the row's checks pass, else 0."""

    def __init__(self, spec: RewardSpec) -> None:
        self.weight = spec.checks_weight

    def score(self, given: Responses) -> list[TermScore]:
        """See `RewardTerm`."""
        for row, verdict in zip(given.rows, given.verdicts, strict=True):
            if verdict.following is None:
                raise UserError(
                    f"row {row.id!r}: ppo.checks_weight needs a check of the governing tier, and checks.{row.tier} "
                    "has none: give the row one, or set ppo.checks_weight=0"
                )
        return [TermScore(float(bool(verdict.following))) for verdict in given.verdicts]


class FunctionTerm:
    """The value of the user's function (`reward.function`)."""

    def __init__(self, spec: RewardSpec) -> None:
        assert spec.function is not None
        self.weight = spec.function_weight
        self._function = UserFunction(spec.function)

    def score(self, given: Responses) -> list[TermScore]:
        """See `RewardTerm`."""
        return [TermScore(value) for value in self._function(list(given.rows), list(given.texts), given.endings)]


def make_terms(spec: RewardSpec) -> dict[str, RewardTerm]:
    """The terms with a weight above 0, by name.

    Raises:
        UserError: a weight without its source, or no weight at all.
    """
    if spec.model_weight > 0 and spec.model is None:
        raise UserError(
            "ppo.model_weight: there is no reward model; run the stage reward, or give reward.path or reward.url"
        )
    if spec.function_weight > 0 and spec.function is None:
        raise UserError("ppo.function_weight: there is no function; give one as reward.function=path/to/file.py:name")
    kinds: dict[str, Callable[[RewardSpec], RewardTerm]] = {
        "model": ModelTerm,
        "checks": ChecksTerm,
        "function": FunctionTerm,
    }
    terms = {name: kind(spec) for name, kind in kinds.items() if getattr(spec, f"{name}_weight") > 0}
    if not terms:
        raise UserError(
            "ppo.model_weight, ppo.checks_weight and ppo.function_weight are all 0; set one of them above 0"
        )
    return terms


def load_scorer(model: Path | str, dtype: str) -> "Scorer | RemoteScorer":
    """The reward model in a folder, or a client of the server at a URL."""
    if isinstance(model, str):
        from reward.serving.client import RemoteScorer

        return RemoteScorer(model)
    from reward import Scorer

    return Scorer.from_pretrained(model, dtype=dtype)
