"""Rows that hold one answer: to be scored, or with absolute labels. Imports no heavy packages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from metaalign_rl.core.dataflow import TIERS, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.rows import parse_row, without_nulls
from reward.score import Mode

_DEFAULTS = {
    "id": "",
    "family": "helpful",
    "relation": "neutral",
    "tier": "dialog",
    "system_info": "",
    "user_info": "",
}


def answer_row(record: Row | Mapping[str, Any], place: str) -> Row:
    """Check a row whose `response` is to be scored.

    Args:
        record: a row. A mapping needs only `messages` and `response`; the other fields have defaults, also where the
            mapping has a null.
        place: names the row in errors.

    Raises:
        UserError: a field is missing or wrong.
    """
    row = record if isinstance(record, Row) else parse_row({**_DEFAULTS, **without_nulls(record)}, place)
    if row.response is None:
        raise UserError(f"{place}: field 'response': expected a string, found nothing")
    return row


def parse_answer(value: str | Mapping[str, Any], answer: str, place: str, mode: Mode = "overall") -> Row:
    """Build the row of an answer from the row's other fields.

    Args:
        value: the row without its answer, as an object or as JSON.
        answer: becomes the row's `response`.
        place: names the row in errors.
        mode: what the score is used for; `tier` needs the field `tier`.

    Raises:
        UserError: `value` is not a row, or a field is missing or wrong.
    """
    record: Any = value
    if isinstance(value, str):
        try:
            record = json.loads(value)
        except (ValueError, RecursionError):
            record = None
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: expected the row as a JSON object, found {str(value)[:80]!r}")
    if mode == "tier" and record.get("tier") is None:
        raise UserError(
            f"{place}: field 'tier': expected one of {', '.join(TIERS)}, because mode 'tier' reads it, found nothing"
        )
    return answer_row({**record, "response": answer}, place)


def parse_openrlhf_batch(
    queries: Sequence[str],
    prompts: Sequence[str],
    labels: Sequence[str],
    special_tokens: Sequence[str],
    mode: Mode = "overall",
) -> list[Row]:
    """Build the rows of a batch in OpenRLHF's form.

    Args:
        queries: prompt and answer as one text, decoded with special tokens.
        prompts: the prompts alone.
        labels: the rows as JSON, without their answers.
        special_tokens: these are removed from the end of an answer.
        mode: see `parse_answer`.

    Raises:
        UserError: the lists differ in length, a query does not start with its prompt, or a label is not a row.
    """
    require_same_length(queries, prompts, labels)
    return [
        parse_openrlhf_answer(*parts, special_tokens, index, mode)
        for index, parts in enumerate(zip(queries, prompts, labels, strict=True))
    ]


def require_same_length(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]) -> None:
    """Raise a `UserError` if the lists of a batch in OpenRLHF's form differ in length."""
    if not len(queries) == len(prompts) == len(labels):
        sizes = f"{len(queries)} query, {len(prompts)} prompts, {len(labels)} labels"
        raise UserError(f"query, prompts and labels: expected lists of the same length, found {sizes}")


def parse_openrlhf_answer(
    query: str, prompt: str, label: str, special_tokens: Sequence[str], index: int, mode: Mode = "overall"
) -> Row:
    """Build the row at `index` of a batch; see `parse_openrlhf_batch`."""
    return parse_answer(label, _answer(query, prompt, special_tokens, index), f"labels[{index}]", mode)


def labelled_answers(row: Row) -> list[tuple[Row, dict[str, bool]]]:
    """The answers of a row that have absolute labels: a row with the answer as its `response`, and the labels.

    Raises:
        UserError: there are labels for an answer that the row does not have.
    """
    answers = []
    for name, labels in row.labels.items():
        text = getattr(row, name)
        if text is None:
            raise UserError(
                f"row {row.id!r}: field 'labels.{name}': the row has no {name!r}; add it or remove its labels"
            )
        answers.append((replace(row, response=text), labels))
    return answers


def _answer(query: str, prompt: str, special_tokens: Sequence[str], index: int) -> str:
    """The text after the prompt, without special tokens at its end."""
    end = _end_of_prompt(prompt, query)
    if end is None:
        raise UserError(
            f"query[{index}]: expected it to start with prompts[{index}], found {query[:80]!r}; "
            "send the prompt and its answer as one text"
        )
    stop = len(query)
    while ending := next((token for token in special_tokens if token and query.endswith(token, end, stop)), None):
        stop -= len(ending)
    return query[end:stop].strip()


def _end_of_prompt(prompt: str, query: str) -> int | None:
    """The index in the query at which the prompt ends, or None if the query does not start with it.

    White space is ignored, because some tokenizers change it when they decode.
    """
    position = 0
    for character in prompt:
        if character.isspace():
            continue
        while position < len(query) and query[position].isspace():
            position += 1
        if position == len(query) or query[position] != character:
            return None
        position += 1
    return position
