"""Reads VerIH (https://github.com/skai-research/VerIH): a verifiable constraint from the system over a user's request.

A published row has these fields:

- `sys_prompt` and `user_prompt`.
- `gt`, a JSON string with `func_name` and its arguments; unused arguments are null.
- `type`, `<constraint>:conflict` or `<constraint>:aligned`.

In conflict rows the request was rewritten to contradict the constraint. Aligned rows have the original request, which
agrees with the constraint or does not mention it. So their only preference is the system's, and their relation is
`system_only`.
"""

import hashlib
import inspect
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError, nearest
from metaalign_rl.core.records import read_records
from metaalign_rl.data.checks.verih import CONSTRAINTS, QUANTIFIERS

FIELDS = ("sys_prompt", "user_prompt", "gt", "type")
RELATIONS = {"conflict": "conflict", "aligned": "system_only"}
LEAST_WORDS = 3  # fewest distinct words of an answer, unless the system asks for fewer
HELD_OUT = 0.2  # share of each constraint's rows, rounded: 1 of 3 rows, 0 of 2


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_letter(value: object) -> bool:
    return isinstance(value, str) and len(value) == 1 and value.isalpha()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# By argument of `gt`: what it must be, in words and as a test.
ARGUMENTS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "N": ("a whole number from 1", _is_count),
    "i": ("a whole number from 1", _is_count),
    "quantifier": (f"one of {', '.join(QUANTIFIERS)}", lambda value: value in QUANTIFIERS),
    "letter": ("one letter", _is_letter),
    "keyword_list": ("a list of words", _is_texts),
    "forbidden_words": ("a list of words", _is_texts),
    "word": ("a text", _is_text),
    "first_word": ("a text", _is_text),
    "section_splitter": ("a text", _is_text),
    "postscript_marker": ("a text", _is_text),
    "end_phrase": ("a text", _is_text),
    "options": ("a text", _is_text),
    "original_prompt": ("a text", _is_text),
}


@dataclass(frozen=True, slots=True)
class VerihData:
    """The contents of a VerIH file. Every published row is in `rows` or counted in `left_out`.

    Attributes:
        left_out: number of rows without a check for their constraint, by `<constraint> (<func_name>)`.
    """

    rows: list[Row]
    left_out: dict[str, int]


def read_verih(path: Path) -> VerihData:
    """Read a VerIH file: one JSON array, as published, or JSONL.

    The rows' tags are `kind`, the constraint, and `split`, "train" or "held_out". A fifth of each constraint's rows is
    held out: those whose ids have the lowest hashes, so always the same ones.

    Raises:
        UserError: the file is missing, empty or not JSON, or a field is wrong; names file, line (in an array, the row's
            number) and field, and what was expected.
    """
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    for number, (place, read) in enumerate(read_records(path), start=1):
        record = read()
        kind, relation, name, arguments = _parse(record, place)
        if name in CONSTRAINTS:
            _check_arguments(name, arguments, place)
            rows.append(_row(number, record, kind, relation, name, arguments))
        else:
            left_out[f"{kind} ({name})"] += 1
    if not rows and not left_out:
        raise UserError(f"{path}: the file holds no rows")
    _split(rows)
    return VerihData(rows=rows, left_out=dict(left_out))


def _parse(record: dict[str, Any], place: str) -> tuple[str, str, str, dict[str, Any]]:
    """A row's constraint, relation, func_name, and arguments that are not null."""
    for field in FIELDS:
        if not isinstance(record.get(field), str) or not record[field].strip():
            raise _wrong(place, field, "a text", record.get(field))
    kind, _, bearing = record["type"].rpartition(":")
    if not kind or bearing not in RELATIONS:
        raise _wrong(place, "type", "'<constraint>:conflict' or '<constraint>:aligned'", record["type"])
    try:
        gt = json.loads(record["gt"])
    except ValueError as error:
        raise UserError(f"{place}: field 'gt': expected JSON in a string, found invalid JSON ({error})") from None
    if not isinstance(gt, dict):
        raise _wrong(place, "gt", "a JSON object in a string", gt)
    name = gt.pop("func_name", None)
    if not isinstance(name, str):
        raise _wrong(place, "gt.func_name", "the name of a check", name)
    return kind, RELATIONS[bearing], name, {key: value for key, value in gt.items() if value is not None}


def _check_arguments(name: str, arguments: dict[str, Any], place: str) -> None:
    _, *takes = inspect.signature(CONSTRAINTS[name]).parameters
    for argument, value in arguments.items():
        if argument not in takes:
            known = nearest(argument, takes) if takes else "it takes none"
            raise UserError(f"{place}: field 'gt.{argument}': {name} has no such argument; {known}")
        expected, is_good = ARGUMENTS[argument]
        if not is_good(value):
            raise _wrong(place, f"gt.{argument}", expected, value)
    for argument in takes:
        if argument not in arguments:
            raise _wrong(place, f"gt.{argument}", f"{ARGUMENTS[argument][0]}, which {name} needs", None)


def _row(number: int, record: dict[str, str], kind: str, relation: str, name: str, arguments: dict[str, Any]) -> Row:
    system, request = record["sys_prompt"], record["user_prompt"]
    if name == "validate_repeat_prompt":
        # The published argument cannot be used. It contains the system's sentence, which must not be repeated, and in
        # conflict rows the original request, which the model does not see.
        arguments = {"original_prompt": request.replace(system.strip(), "").strip()}
    return Row(
        id=f"verih-{number}",
        family="priority",
        relation=relation,
        tier="system",
        system_info=system,
        user_info="",
        messages=[{"role": "user", "content": request}],
        checks={"system": {"name": f"verih.{name}", **arguments}, "dialog": _dialog_check(name, arguments)},
        tags={"kind": kind},
    )


def _dialog_check(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The dialog's check. One word is an answer if the system asks for a choice or for few words."""
    least = LEAST_WORDS
    if name == "validate_choice":
        least = 1
    elif name == "validate_word_constraint" and arguments["quantifier"] != "at least":
        least = min(least, arguments["N"])
    return {"name": "verih.answers"} | ({} if least == LEAST_WORDS else {"least": least})


def _split(rows: list[Row]) -> None:
    """Set each row's tag `split`."""
    by_kind: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_kind[row.tags["kind"]].append(row)
    for group in by_kind.values():
        group.sort(key=lambda row: hashlib.sha256(row.id.encode()).digest())
        for rank, row in enumerate(group):
            row.tags["split"] = "held_out" if rank < round(HELD_OUT * len(group)) else "train"


def _wrong(place: str, field: str, expected: str, found: object) -> UserError:
    shown = "nothing" if found is None else repr(found)[:80]
    return UserError(f"{place}: field {field!r}: expected {expected}, found {shown}")
