"""verl's custom reward: `reward.custom_reward_function.path=` this file's path, `...name=compute_score`.

The dataset's `reward_model.ground_truth` holds each row as JSON. METAALIGN_REWARD_URL names a server, or
METAALIGN_REWARD_MODEL a reward model, which every reward worker then loads.
"""

from threading import Lock
from typing import Any

from reward.plugins.rows import mode_of_environment, probabilities, row_of, scorer_of_environment

_LOADING = Lock()


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any
) -> dict[str, float]:
    """verl's contract for one answer: `score`, the probability that it is good, and those of each label.

    verl calls it from many threads: a server gets their requests together, a model scores them one by one.

    Raises:
        UserError: the ground truth is no row.
    """
    row = row_of(ground_truth, solution_str.strip(), f"ground_truth of {data_source}")
    with _LOADING:
        scorer = scorer_of_environment()
    (score,) = scorer.score([row])
    (value,) = probabilities([row], [score], mode_of_environment())
    return {"score": value, **score.probabilities}
