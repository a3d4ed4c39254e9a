"""TRL's reward function, for GRPOTrainer and similar trainers: `reward_funcs=[make_reward_func(scorer)]`.

The training data set has a column `row`, the row as an object or as JSON, in addition to TRL's column `prompt`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reward.answers import parse_answer
from reward.score import Mode, check_mode, combine

if TYPE_CHECKING:
    from reward.scorer import Scorer
    from reward.serving.client import RemoteScorer

Completion = str | Sequence[Mapping[str, str]]


def make_reward_func(scorer: "Scorer | RemoteScorer", mode: Mode = "overall") -> Callable[..., list[float]]:
    """Make a reward function for TRL, which calls it with the columns of a batch.

    Args:
        mode: see `combine`.

    Returns:
        A function that returns the probability that each completion is good, from 0 to 1.

    Raises:
        UserError: the mode is unknown.
    """
    check_mode(mode)

    def metaalign_reward(
        completions: Sequence[Completion], row: Sequence[str | Mapping[str, Any]], **_: Any
    ) -> list[float]:
        rows = [
            parse_answer(value, _text(completion), f"row[{index}]", mode)
            for index, (value, completion) in enumerate(zip(row, completions, strict=True))
        ]
        return [combine(score, parsed, mode) for score, parsed in zip(scorer.score(rows), rows, strict=True)]

    return metaalign_reward


def _text(completion: Completion) -> str:
    return (completion if isinstance(completion, str) else completion[-1]["content"]).strip()
