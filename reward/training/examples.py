"""Training examples, tokenised: pairs of answers, and answers with absolute labels. Batches of them as tensors."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan, nan

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from metaalign_rl.core.batching import Line, lay_out, pad
from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import encode_answer
from metaalign_rl.core.parallel import map_rows
from reward.answers import labelled_answers
from reward.training.config import RewardTraining

RewardBatch = dict[str, Tensor]
"""Examples as tensors; `collate` and `collate_shared` list the keys."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row's answers, tokenised with their meta-prompt and dialog.

    Attributes:
        texts: token ids of the chosen and the rejected answer (if `is_pair`), then of a labelled response.
        labels: for each text and each of `LABELS`, 1, 0 or NaN (unknown).
        is_pair: whether the first two texts are a pair.
        ranked: for each of `LABELS`, 1 if the chosen answer should score higher, -1 if the rejected answer should, 0 if
            the pair does not rank the label.
        strength: how much better the chosen answer is, from 0 to 1; 1 if the row does not state it.
    """

    texts: tuple[list[int], ...]
    labels: tuple[tuple[float, ...], ...]
    is_pair: bool
    ranked: tuple[int, ...]
    strength: float = 1.0

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return max(len(text) for text in self.texts)


def ranked_labels(row: Row) -> tuple[int, ...]:
    """How a pair ranks each of `LABELS`: 1 chosen is better, -1 rejected is better, 0 not ranked.

    If both answers have an absolute label, the labels decide: in a conflict the rejected answer is the one that does
    what the lower tier asks. Otherwise the chosen answer is better `overall` and for the governing tier.
    """
    chosen, rejected = row.labels.get("chosen", {}), row.labels.get("rejected", {})

    def rank(label: str) -> int:
        if label in chosen and label in rejected:
            return int(chosen[label]) - int(rejected[label])
        return int(label in (row.tier, "overall"))

    return tuple(rank(label) for label in LABELS)


def make_example(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Example:
    """Tokenise a row's pair and its labelled response.

    Raises:
        UserError: the row has neither, its two answers have the same tokens, labels belong to a missing answer, or the
            tiers leave no room for an answer in `max_tokens`.
    """
    is_pair = row.chosen is not None
    answers = ["chosen", "rejected"] if is_pair else []
    if row.labels.get("response"):
        answers.append("response")
    if not answers:
        raise UserError(
            f"row {row.id!r}: expected 'chosen' and 'rejected', or a 'response' with 'labels'; found neither"
        )
    labelled_answers(row)  # refuses labels of a missing answer
    texts = tuple(encode_answer(tokenizer, row, getattr(row, answer), max_tokens=max_tokens).ids for answer in answers)
    if is_pair and texts[0] == texts[1]:
        raise UserError(
            f"row {row.id!r}: 'chosen' and 'rejected' are the same tokens; remove the row or make the answers differ"
        )
    labels = tuple(tuple(row.labels.get(answer, {}).get(label, nan) for label in LABELS) for answer in answers)
    ranked = ranked_labels(row) if is_pair else (0,) * len(LABELS)
    return Example(texts, labels, is_pair, ranked, 1.0 if row.strength is None else row.strength)


def make_examples(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Example]:
    """Tokenise all rows; see `make_example`.

    Raises:
        UserError: names all rows that `make_example` refuses, see `BadRows`.
    """
    return map_rows(partial(make_example, tokenizer=tokenizer, max_tokens=max_tokens), rows)


def labels_with_data(examples: Iterable[Example], config: RewardTraining) -> tuple[str, ...]:
    """The labels that a training changes: a pair ranks them, or an answer has them, and their loss has a weight."""
    found = set()
    for example in examples:
        if config.bt_weight > 0:
            found |= {label for label, rank in zip(LABELS, example.ranked, strict=True) if rank}
        if config.bce_weight > 0 or config.token_weight > 0:
            found |= {
                label for row in example.labels for label, value in zip(LABELS, row, strict=True) if not isnan(value)
            }
    return tuple(label for label in LABELS if label in found and label in config.trained_labels)


def collate(examples: Sequence[Example], pad_token: int, trained_labels: Collection[str] = LABELS) -> RewardBatch:
    """Make a batch in which every text has its own line.

    Args:
        trained_labels: the other labels are unknown in the batch, even if the examples have them.

    Returns:
        `input_ids`, `attention_mask`: [texts, tokens].
        `labels`: [texts, 4], 1, 0 or NaN (unknown).
        `chosen`, `rejected`: [pairs], the indices of the pairs' texts.
        `ranked`: [pairs, 4], 1, -1 or 0; see `Example`.
        `strength`: [pairs].
    """
    texts = [text for example in examples for text in example.texts]
    return {**pad(texts, pad_token), **_targets(examples, trained_labels)}


def collate_shared(
    examples: Sequence[Example], pad_token: int, trained_labels: Collection[str] = LABELS
) -> RewardBatch:
    """Make a batch in which the two answers of a pair share one line.

    The line of a pair holds the tokens before the answers differ, then the rest of each answer. See
    `metaalign_rl.core.batching.Lines`.

    Args:
        trained_labels: see `collate`.

    Returns:
        `input_ids`, `position_ids`: [lines, tokens].
        `attention_mask`: [lines, 1, tokens, tokens]; absent if causal attention is enough.
        `text_of_token`: [lines, tokens], the index of the text that a token belongs to; -1 for tokens before the
            answers differ, for all but the last token of a labelled response, and for padding.
        `last_token`: [texts], the index of each text's last token in the flattened lines.
        The other keys: see `collate`.
    """
    lines = lay_out([line for example in examples for line in _lines(example)], pad_token)
    width = lines.input_ids.shape[1]
    text_of_token = torch.full(lines.input_ids.shape, -1)
    for text, (row, start, end) in enumerate(lines.spans):
        text_of_token[row, start:end] = text
    return {
        "input_ids": lines.input_ids,
        "position_ids": lines.position_ids,
        **({} if lines.attention_mask is None else {"attention_mask": lines.attention_mask}),
        "text_of_token": text_of_token,
        "last_token": torch.tensor([row * width + end - 1 for row, _, end in lines.spans]),
        **_targets(examples, trained_labels),
    }


def collate_separate(
    examples: Sequence[Example], pad_token: int, trained_labels: Collection[str] = LABELS
) -> RewardBatch:
    """Make a batch in which every text has its own line, with a score for each token.

    For models that do not compute the same for answers that share a line; see `supports_shared_lines`.

    Args:
        trained_labels: see `collate`.

    Returns:
        The keys of `collate`, and `text_of_token` and `last_token` of `collate_shared`.
    """
    batch = collate(examples, pad_token, trained_labels)
    width = batch["input_ids"].shape[1]
    text_of_token = torch.full(batch["input_ids"].shape, -1)
    ends = []
    for index, (start, end) in enumerate(span for example in examples for span in _scored_spans(example)):
        text_of_token[index, start:end] = index
        ends.append(index * width + end - 1)
    return {**batch, "text_of_token": text_of_token, "last_token": torch.tensor(ends)}


def _scored_spans(example: Example) -> Iterator[tuple[int, int]]:
    """For each text of an example, the tokens that get a loss: from where a pair differs, or the last token."""
    pair = example.texts[:2] if example.is_pair else ()
    split = _first_difference(*pair) if pair else 0
    for index, text in enumerate(example.texts):
        yield (split if index < len(pair) else len(text) - 1), len(text)


def _lines(example: Example) -> Iterator[Line]:
    """The example's texts in order: a pair as one line, a labelled answer as its own line."""
    pair, others = (example.texts[:2], example.texts[2:]) if example.is_pair else ((), example.texts)
    if pair:
        split = _first_difference(*pair)
        yield Line(pair[0][:split], [text[split:] for text in pair])
    for text in others:
        yield Line(text[:-1], [text[-1:]])


def _first_difference(one: list[int], other: list[int]) -> int:
    """The first index at which two texts differ; both keep at least their last token."""
    limit = min(len(one), len(other)) - 1
    return next((index for index in range(limit) if one[index] != other[index]), limit)


def _targets(examples: Sequence[Example], trained_labels: Collection[str]) -> RewardBatch:
    starts, start = [], 0
    for example in examples:
        if example.is_pair:
            starts.append(start)
        start += len(example.texts)
    chosen = torch.tensor(starts, dtype=torch.long)
    labels = torch.tensor([labels for example in examples for labels in example.labels], dtype=torch.float32)
    ranked = torch.tensor([e.ranked for e in examples if e.is_pair], dtype=torch.float32).reshape(-1, len(LABELS))
    untrained = torch.tensor([label not in trained_labels for label in LABELS])
    return {
        "labels": labels.masked_fill(untrained, nan),
        "chosen": chosen,
        "rejected": chosen + 1,
        "ranked": ranked.masked_fill(untrained, 0),
        "strength": torch.tensor([e.strength for e in examples if e.is_pair], dtype=torch.float32),
    }
