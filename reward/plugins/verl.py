"""verl's reward function. Set `reward.custom_reward_function.path` to this file and `...name` to `compute_score`.

The field `reward_model.ground_truth` of the data set holds each row as JSON. METAALIGN_REWARD_URL is the address of a
server. Without it, METAALIGN_REWARD_MODEL is the folder of a reward model, which every reward worker loads.
"""

from threading import Lock
from typing import Any

from reward.answers import parse_answer
from reward.plugins.environment import mode_from_environment, scorer_from_environment
from reward.score import combine

_LOADING = Lock()


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any
) -> dict[str, float]:
    """verl calls this for one answer, from many threads. A server batches the calls; a model scores them one by one.

    Args:
        data_source: names the data set in errors.
        solution_str: the answer.
        ground_truth: the row as JSON.

    Returns:
        `score`, the probability that the answer is good, and the probabilities by label.

    Raises:
        UserError: the ground truth is not a row.
    """
    mode = mode_from_environment()
    row = parse_answer(ground_truth, solution_str.strip(), f"ground_truth of {data_source}", mode)
    with _LOADING:
        scorer = scorer_from_environment()
    (score,) = scorer.score([row])
    return {"score": combine(score, row, mode), **score.probabilities}
