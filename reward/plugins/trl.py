"""TRL's reward function, for GRPOTrainer and similar trainers: `reward_funcs=[make_reward_func(scorer)]`.

The training data set has a column `row`, the row as an object or as JSON, in addition to TRL's column `prompt`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metaalign_rl.core.errors import UserError
from reward.answers import parse_answer
from reward.score import Mode, check_mode, combine

if TYPE_CHECKING:
    from reward.scorer import Scorer
    from reward.serving.client import RemoteScorer

Completion = str | Sequence[Mapping[str, Any]]


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
            parse_answer(value, _text(completion, f"completions[{index}]"), f"row[{index}]", mode)
            for index, (value, completion) in enumerate(zip(row, completions, strict=True))
        ]
        return [combine(score, parsed, mode) for score, parsed in zip(scorer.score(rows), rows, strict=True)]

    return metaalign_reward


def _text(completion: Completion, place: str) -> str:
    """The text of a completion: of its last message, which must be the assistant's. No content is an empty text.

    Raises:
        UserError: the completion has no such message, or a part of it is no text.
    """
    if isinstance(completion, str):
        return completion.strip()
    message: Mapping[str, Any] = completion[-1] if completion else {}
    if message.get("role") != "assistant":
        raise UserError(
            f"{place}: expected the assistant's message last, found {message.get('role') or 'no message'}; "
            "end each completion with the model's answer"
        )
    content = message.get("content") or ""
    if isinstance(content, str):
        return content.strip()
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: expected text, found {str(content)[:80]}; only text can be scored")
    return "".join(map(str, texts)).strip()
