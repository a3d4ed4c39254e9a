"""OpenRLHF's reward function. Pass the path of this file as `--reward.remote_url`.

The label column of the data set (`--data.label_key`) holds each row as JSON. METAALIGN_REWARD_MODEL is the folder of
the reward model. Or METAALIGN_REWARD_URL is the address of a scoring server, and METAALIGN_REWARD_TOKEN its token. A
server without a token needs no plugin: `--reward.remote_url http://HOST:PORT/get_reward`.
"""

from collections.abc import Sequence
from typing import Any

from metaalign_rl.core.dataflow import LABELS
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
        UserError: a label is not a row, or a query does not start with its prompt.
        ScorerUnavailable: the server does not answer.
    """
    import torch

    from reward.serving.client import RemoteScorer

    scorer = scorer_from_environment()
    if isinstance(scorer, RemoteScorer):  # the server's own mode, and its tokenizer, which finds the end of an answer
        reply = scorer.get_reward(queries, prompts, labels)
        rewards, logs = torch.tensor(reply["rewards"]), {k: torch.tensor(v) for k, v in reply["extra_logs"].items()}
        return {"rewards": rewards, "scores": rewards, "extra_logs": logs}
    mode = mode_from_environment()
    rows = parse_openrlhf_batch(queries, prompts, labels, scorer.tokenizer.all_special_tokens, mode)
    scores = scorer.score(rows)
    rewards = torch.tensor([combine(score, row, mode) for score, row in zip(scores, rows, strict=True)])
    logs = {label: torch.tensor([score.probabilities[label] for score in scores]) for label in LABELS}
    return {"rewards": rewards, "scores": rewards, "extra_logs": logs}
