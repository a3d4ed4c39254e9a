"""What the reward model is trained on: pairs of answers, and answers with absolute labels."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from metaalign_rl.core.batching import Line, lay_out, pad
from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import encode_row
from metaalign_rl.core.rows import parse_row

_UNSAID = {
    "id": "",
    "family": "helpful",
    "relation": "neutral",
    "tier": "dialog",
    "system_info": "",
    "user_info": "",
}


@dataclass(frozen=True, slots=True)
class Example:
    """One row's answers, tokenised with their meta-prompt and dialog.

    Attributes:
        texts: the chosen and the rejected answer's token ids (where `is_pair`), then a labelled response's.
        labels: by text, 1, 0 or NaN (not known) for each of `LABELS`.
        is_pair: whether the first two texts are a pair.
        ranked: for each of `LABELS`, 1 where the chosen answer's score should be the higher one, -1 where the
            rejected answer's, 0 where the pair does not say.
        strength: how much better, a share; 1 where the row does not say.
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


def answer_row(record: Row | Mapping[str, Any], place: str) -> Row:
    """The row of one answer to be scored; a mapping may leave out everything but `messages` and `response`.

    Raises:
        UserError: names `place` and the field.
    """
    row = record if isinstance(record, Row) else parse_row({**_UNSAID, **record}, place)
    if row.response is None:
        raise UserError(f"{place}: field 'response': expected a string, found nothing")
    return row


def labelled_answers(row: Row) -> list[tuple[Row, dict[str, bool]]]:
    """The row's answers that have absolute labels, each as a row with that answer as its `response`.

    Raises:
        UserError: labels for an answer that the row does not have.
    """
    answers = []
    for answer, labels in row.labels.items():
        text = getattr(row, answer)
        if text is None:
            raise UserError(f"row {row.id!r}: field 'labels.{answer}': the row has no {answer!r}")
        answers.append((replace(row, response=text), labels))
    return answers


def ranked_labels(row: Row) -> tuple[int, ...]:
    """For each of `LABELS`, what the pair says: 1 the chosen answer is better in it, -1 the rejected one, 0 nothing.

    Where the row has absolute labels of both answers, they say it: in a conflict the rejected answer is the one that
    does what the lower tier asks. Elsewhere the chosen answer is better `overall` and for the governing tier.
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
        UserError: the row has neither, a pair of answers that are alike, or tiers that leave no room for an
            answer in `max_tokens`.
    """
    is_pair = row.chosen is not None
    answers = ["chosen", "rejected"] if is_pair else []
    if row.labels.get("response"):
        answers.append("response")
    if not answers:
        raise UserError(
            f"row {row.id!r}: expected 'chosen' and 'rejected', or a 'response' with 'labels'; found neither"
        )
    labelled_answers(row)  # refuses labels of an answer that is not there
    texts = tuple(
        encode_row(tokenizer, row, max_tokens=max_tokens, response=getattr(row, answer)) for answer in answers
    )
    if is_pair and texts[0] == texts[1]:
        raise UserError(f"row {row.id!r}: the tokenizer cannot tell 'chosen' from 'rejected', they are the same tokens")
    labels = tuple(tuple(row.labels.get(answer, {}).get(label, nan) for label in LABELS) for answer in answers)
    ranked = ranked_labels(row) if is_pair else (0,) * len(LABELS)
    return Example(texts, labels, is_pair, ranked, 1.0 if row.strength is None else row.strength)


def make_examples(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Example]:
    """Tokenise all rows, once."""
    return [make_example(row, tokenizer, max_tokens) for row in rows]


def collate(examples: Sequence[Example], pad_token: int, trained: Collection[str] = LABELS) -> dict[str, torch.Tensor]:
    """One batch, each answer with a prompt of its own.

    Args:
        trained: of the other labels nothing is known in the batch, whatever the examples say.

    Returns:
        `input_ids`, `attention_mask` [texts, tokens]; `labels` [texts, 4], NaN where not known; `chosen`, `rejected`
        [pairs], where the pairs' answers stand among the texts; `ranked` [pairs, 4], 1, -1 or 0; `strength` [pairs].
    """
    texts = [text for example in examples for text in example.texts]
    return {**pad(texts, pad_token), **_targets(examples, trained)}


def collate_shared(
    examples: Sequence[Example], pad_token: int, trained: Collection[str] = LABELS
) -> dict[str, torch.Tensor]:
    """One batch in which the two answers of a pair share one pass over what they have in common.

    A pair is one line: the tokens up to where its answers part, then the rest of each. See
    `metaalign_rl.core.batching.Lines`.

    Args:
        trained: as `collate`.

    Returns:
        `input_ids`, `position_ids` [lines, tokens]; `attention_mask` [lines, 1, tokens, tokens], if it is
        not just causal; `judged` [lines, tokens], the number of the text whose worth a token shows, -1 before answers
        part; `last` [texts], where each text's last token stands in the flattened lines; the rest as `collate`.
    """
    lines = lay_out([line for example in examples for line in _lines(example)], pad_token)
    width = lines.input_ids.shape[1]
    judged = torch.full(lines.input_ids.shape, -1)
    for text, (row, start, end) in enumerate(lines.spans):
        judged[row, start:end] = text
    return {
        "input_ids": lines.input_ids,
        "position_ids": lines.position_ids,
        **({} if lines.attention_mask is None else {"attention_mask": lines.attention_mask}),
        "judged": judged,
        "last": torch.tensor([row * width + end - 1 for row, _, end in lines.spans]),
        **_targets(examples, trained),
    }


def _lines(example: Example) -> Iterator[Line]:
    """The example's texts, in their order: the pair as one line, a labelled answer as one of its own."""
    pair, others = (example.texts[:2], example.texts[2:]) if example.is_pair else ((), example.texts)
    if pair:
        parting = _parting(*pair)
        yield Line(pair[0][:parting], [text[parting:] for text in pair])
    for text in others:
        yield Line(text[:-1], [text[-1:]])


def _parting(one: list[int], other: list[int]) -> int:
    """The position from which two texts differ; each keeps a token of its own."""
    least = min(len(one), len(other)) - 1
    return next((at for at in range(least) if one[at] != other[at]), least)


def _targets(examples: Sequence[Example], trained: Collection[str]) -> dict[str, torch.Tensor]:
    starts, start = [], 0
    for example in examples:
        if example.is_pair:
            starts.append(start)
        start += len(example.texts)
    chosen = torch.tensor(starts, dtype=torch.long)
    labels = torch.tensor([labels for example in examples for labels in example.labels], dtype=torch.float32)
    ranked = torch.tensor([e.ranked for e in examples if e.is_pair], dtype=torch.float32).reshape(-1, len(LABELS))
    unasked = torch.tensor([label not in trained for label in LABELS])
    return {
        "labels": labels.masked_fill(unasked, nan),
        "chosen": chosen,
        "rejected": chosen + 1,
        "ranked": ranked.masked_fill(unasked, 0),
        "strength": torch.tensor([e.strength for e in examples if e.is_pair], dtype=torch.float32),
    }
