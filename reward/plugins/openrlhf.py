"""OpenRLHF's reward function: give this file's path as `--reward.remote_url`.

The dataset's label column holds each row as JSON (`--data.label_key`). METAALIGN_REWARD_MODEL names the reward model.
A server takes the same labels: `--reward.remote_url http://HOST:PORT/get_reward`.
"""

from collections.abc import Sequence
from typing import Any

from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.errors import UserError
from reward.plugins.rows import mode_of_environment, probabilities, row_of, scorer_of_environment


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """OpenRLHF's contract.

    Args:
        queries: prompt and answer, decoded with special tokens.
        labels: the rows as JSON.

    Returns: `rewards` and `scores`, float tensors [answers], and `extra_logs`, the probabilities by label.

    Raises:
        UserError: a label that is no row, or a query that does not begin with its prompt.
    """
    import torch

    from reward.scorer import Scorer

    scorer, mode = scorer_of_environment(), mode_of_environment()
    if not isinstance(scorer, Scorer):
        raise UserError("the answer's end is found by the reward model's tokenizer: set METAALIGN_REWARD_MODEL, or "
                        "give OpenRLHF the server's own address, .../get_reward")  # fmt: skip
    rows = rows_of(queries, prompts, labels, scorer.tokenizer.all_special_tokens)
    scores = scorer.score(rows)
    rewards = torch.tensor(probabilities(rows, scores, mode))
    logs = {label: torch.tensor([score.probabilities[label] for score in scores]) for label in LABELS}
    return {"rewards": rewards, "scores": rewards, "extra_logs": logs}


def rows_of(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str], special_tokens: Sequence[str]
) -> list[Row]:
    """The rows of the labels, each with the answer that stands behind its prompt.

    Args:
        special_tokens: what may stand behind an answer.

    Raises:
        UserError: names the list, the place and the remedy.
    """
    if not len(queries) == len(prompts) == len(labels):
        sizes = f"{len(queries)} query, {len(prompts)} prompts, {len(labels)} labels"
        raise UserError(f"query, prompts and labels: expected as many of each, found {sizes}")
    return [
        row_of(label, _answer(query, prompt, special_tokens, index), f"labels[{index}]")
        for index, (query, prompt, label) in enumerate(zip(queries, prompts, labels, strict=True))
    ]


def _answer(query: str, prompt: str, special_tokens: Sequence[str], index: int) -> str:
    end = _end_of(prompt, query)
    if end is None:
        raise UserError(f"query[{index}]: expected prompts[{index}] and the answer behind it, found another beginning")
    answer = query[end:]
    while ending := next((token for token in special_tokens if token and answer.endswith(token)), None):
        answer = answer.removesuffix(ending)
    return answer.strip()


def _end_of(prompt: str, query: str) -> int | None:
    """Where the prompt ends in the query; white space aside, which not every tokenizer gives back as it was."""
    place = 0
    for character in prompt:
        if character.isspace():
            continue
        while place < len(query) and query[place].isspace():
            place += 1
        if place == len(query) or query[place] != character:
            return None
        place += 1
    return place
