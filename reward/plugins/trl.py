"""TRL's reward function, for GRPOTrainer and its like: `reward_funcs=[make_reward_func(scorer)]`.

The training dataset has a column `row` with each row (an object or its JSON) beside TRL's `prompt`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reward.plugins.rows import probabilities, row_of
from reward.score import Mode, check_mode

if TYPE_CHECKING:
    from reward.scorer import Scorer
    from reward.serving.client import RemoteScorer

Completion = str | Sequence[Mapping[str, str]]


def make_reward_func(scorer: "Scorer | RemoteScorer", mode: Mode = "overall") -> Callable[..., list[float]]:
    """A function that TRL calls with its columns; it returns the probabilities that the completions are good."""
    check_mode(mode)

    def metaalign_reward(
        completions: Sequence[Completion], row: Sequence[str | Mapping[str, Any]], **_: Any
    ) -> list[float]:
        rows = [
            row_of(value, _text(completion), f"row[{index}]")
            for index, (value, completion) in enumerate(zip(row, completions, strict=True))
        ]
        return probabilities(rows, scorer.score(rows), mode)

    return metaalign_reward


def _text(completion: Completion) -> str:
    return (completion if isinstance(completion, str) else completion[-1]["content"]).strip()
