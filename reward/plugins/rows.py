"""What the plugins share: rows that come as JSON beside a prompt, and one probability for each answer."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from reward.examples import answer_row
from reward.score import Mode, Score, check_mode, combine

if TYPE_CHECKING:
    from reward.scorer import Scorer
    from reward.serving.client import RemoteScorer

MODEL, DTYPE = "METAALIGN_REWARD_MODEL", "METAALIGN_REWARD_DTYPE"
URL, MODE = "METAALIGN_REWARD_URL", "METAALIGN_REWARD_MODE"


@cache
def scorer_of_environment() -> "Scorer | RemoteScorer":
    """The scorer that METAALIGN_REWARD_URL (a server) or METAALIGN_REWARD_MODEL (a folder) names, loaded once.

    METAALIGN_REWARD_DTYPE is the type of a folder's weights; without it `Scorer.from_pretrained` chooses.

    Raises:
        UserError: neither is set.
    """
    if url := os.environ.get(URL):
        from reward.serving.client import RemoteScorer

        return RemoteScorer(url)
    if model := os.environ.get(MODEL):
        from reward.scorer import Scorer

        return Scorer.from_pretrained(model, dtype=os.environ.get(DTYPE))
    raise UserError(f"set {MODEL} to a reward model's folder, or {URL} to a server's address")


def mode_of_environment() -> Mode:
    """The score that METAALIGN_REWARD_MODE names, else `overall`.

    Raises:
        UserError: there is no such score.
    """
    mode = os.environ.get(MODE, "overall")
    check_mode(mode)
    return mode  # type: ignore[return-value]


def row_of(value: str | Mapping[str, Any], answer: str, place: str) -> Row:
    """The row, given as an object or as its JSON, with `answer` as what is to be scored.

    Raises:
        UserError: it is none, or lacks a field; names `place`.
    """
    record: Any = value
    if isinstance(value, str):
        try:
            record = json.loads(value)
        except (ValueError, RecursionError):
            record = None
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: expected the row as a JSON object, found {str(value)[:80]!r}")
    return answer_row({**record, "response": answer}, place)


def probabilities(rows: Sequence[Row], scores: Sequence[Score], mode: Mode) -> list[float]:
    """For each row the probability, 0 to 1, that its answer is good."""
    return [combine(score, row, mode) for row, score in zip(rows, scores, strict=True)]
