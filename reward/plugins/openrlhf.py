"""OpenRLHF's reward function. Pass the path of this file as `--reward.remote_url`.

The label column of the data set (`--data.label_key`) holds each row as JSON. METAALIGN_REWARD_MODEL is the folder of
the reward model. A scoring server accepts the same labels: `--reward.remote_url http://HOST:PORT/get_reward`.
"""

from collections.abc import Sequence
from typing import Any

from metaalign_rl.core.dataflow import LABELS
from metaalign_rl.core.errors import UserError
from reward.answers import parse_openrlhf_batch
from reward.plugins.environment import mode_from_environment, scorer_from_environment
from reward.score import combine


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """OpenRLHF calls this for a batch of answers.

    Args:
        queries: prompt and answer as one text, decoded with special tokens.
        prompts: the prompts alone.
        labels: the rows as JSON.

    Returns:
        `rewards` and `scores`, the probability that each answer is good: float tensors, [answers]. `extra_logs`, the
        probabilities by label: tensors of the same shape.

    Raises:
        UserError: a label is not a row, a query does not start with its prompt, or METAALIGN_REWARD_URL is set.
    """
    import torch

    from reward.scorer import Scorer

    scorer, mode = scorer_from_environment(), mode_from_environment()
    if not isinstance(scorer, Scorer):
        raise UserError(
            "METAALIGN_REWARD_URL: not used here, because the reward model's tokenizer finds the end of an answer; "
            "set METAALIGN_REWARD_MODEL, or give OpenRLHF the server's address, .../get_reward"
        )
    rows = parse_openrlhf_batch(queries, prompts, labels, scorer.tokenizer.all_special_tokens)
    scores = scorer.score(rows)
    rewards = torch.tensor([combine(score, row, mode) for score, row in zip(scores, rows, strict=True)])
    logs = {label: torch.tensor([score.probabilities[label] for score in scores]) for label in LABELS}
    return {"rewards": rewards, "scores": rewards, "extra_logs": logs}
