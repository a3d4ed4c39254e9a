"""Reading rows: the one schema that data sources, the reward model, PPO and evaluation share."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from metaalign_rl.core.dataflow import ANSWERS, FAMILIES, LABELS, RELATIONS, TIERS, Row
from metaalign_rl.core.errors import BadRows, UserError, nearest
from metaalign_rl.core.records import Record, read_records


def parse_row(record: dict[str, Any], place: str) -> Row:
    """The row in a JSON object, checked against the schema.

    A null counts as left out, because tables (pandas, Parquet, `datasets`) have a value in every column. A tier that is
    left out has no text. An id may be an integer.

    Args:
        place: file and line, for errors.

    Raises:
        UserError: a field is missing, unknown or wrong; names the place, the field, what was expected and found.
    """
    record = {"system_info": "", "user_info": "", **without_nulls(record)}
    if isinstance(record.get("id"), int) and not isinstance(record["id"], bool):
        record["id"] = str(record["id"])
    names = {f.name for f in fields(Row)}
    for name in record:
        if name not in names:
            foreign = "" if "messages" in record else "; the file has another format: docs/data.md lists the fields"
            raise UserError(f"{place}: unknown field {name!r}; {nearest(name, names)}{foreign}")
    for name in ("id", "family", "relation", "tier", "system_info", "user_info"):
        _require(isinstance(record.get(name), str), place, name, "a string", record)
    for name, allowed in (("family", FAMILIES), ("relation", RELATIONS), ("tier", TIERS)):
        _require(record[name] in allowed, place, name, f"one of {', '.join(allowed)}", record)
    for name in ANSWERS:
        _require(record.get(name) is None or isinstance(record[name], str), place, name, "a string", record)
    _check_pairing(record, place)
    strength = record.get("strength")
    is_share = isinstance(strength, float | int) and not isinstance(strength, bool) and 0 <= strength <= 1
    _require(strength is None or is_share, place, "strength", "a number from 0 to 1", record)
    _check_messages(record, place)
    _check_tables(record, place)
    _check_characters(record, place)
    return Row(**record)


def without_nulls(value: Any, depth: int = 3) -> Any:
    """The value without keys whose value is null, in its objects too, as deep as a row's tables are."""
    if depth and isinstance(value, Mapping):
        return {key: without_nulls(item, depth - 1) for key, item in value.items() if item is not None}
    if depth and isinstance(value, list):
        return [without_nulls(item, depth - 1) for item in value]
    return value


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a data file, each checked when it is reached. Ids must be unique.

    Raises:
        UserError: see `read_records` and `parse_row`; or an id occurs twice, or the file has no rows.
    """
    seen: dict[str, str] = {}
    for record in read_records(path):
        yield _unique(record, seen)
    if not seen:
        raise UserError(f"{path}: the file holds no rows")


def read_checked_rows(path: Path, check: Callable[[Row, str], object], bad: BadRows) -> list[Row]:
    """The rows of a data file that have the schema; `bad` collects the errors.

    Args:
        check: called with each row and its place; raises a `UserError` for a row that the schema allows but its use
            does not.
    """
    rows: list[Row] = []
    seen: dict[str, str] = {}
    is_empty = True
    with bad.collect():
        for record in read_records(path):
            is_empty = False
            with bad.collect():
                row = _unique(record, seen)
                rows.append(row)
                check(row, record.place)
        if is_empty:
            raise UserError(f"{path}: the file holds no rows")
    return rows


def _unique(record: Record, seen: dict[str, str]) -> Row:
    row = parse_row(record.read(), record.place)
    if row.id in seen:
        place = f"{record.place}: field 'id'"
        raise UserError(f"{place}: expected a unique id, found {row.id!r}, as in {seen[row.id]}")
    seen[row.id] = record.place
    return row


def _require(condition: bool, place: str, name: str, expected: str, record: dict[str, Any]) -> None:
    if not condition:
        found = repr(record[name]) if name in record else "nothing"
        raise UserError(f"{place}: field {name!r}: expected {expected}, found {found[:80]}")


def _check_pairing(record: dict[str, Any], place: str) -> None:
    for name, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if record.get(name) is not None and record.get(other) is None:
            raise UserError(f"{place}: field {other!r}: expected a string, because {name!r} is given, found nothing")


def _check_messages(record: dict[str, Any], place: str) -> None:
    messages = record.get("messages")
    _require(isinstance(messages, list) and bool(messages), place, "messages", "a list of messages", record)
    assert isinstance(messages, list)
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        good = isinstance(message, dict) and set(message) == {"role", "content"}
        if not good or not isinstance(message["content"], str) or message["role"] not in ("user", "assistant"):
            raise UserError(
                f"{place}: field {at!r}: expected {{'role': 'user' or 'assistant', 'content': text}} "
                f"(the system's text belongs in 'system_info'), found {repr(message)[:80]}"
            )
    if messages[-1]["role"] != "user":
        raise UserError(f"{place}: field 'messages': expected the user's message last, found the assistant's")


def _check_characters(record: dict[str, Any], place: str) -> None:
    """Refuse lone surrogates: JSON can hold such half characters, but tokenizers and files cannot."""
    names = ("id", "system_info", "user_info", *ANSWERS)
    texts = {name: record[name] for name in names if record.get(name)}
    texts |= {f"messages[{index}]": message["content"] for index, message in enumerate(record["messages"])}
    for name, text in texts.items():
        if half := re.search("[\ud800-\udfff]", text):
            raise UserError(
                f"{place}: field {name!r}: expected complete characters, found {half[0]!r} at {half.start()}"
            )


def _check_tables(record: dict[str, Any], place: str) -> None:
    for name, keys in (("checks", TIERS), ("labels", ANSWERS)):
        table = record.get(name, {})
        _require(isinstance(table, dict), place, name, "an object", record)
        for key, value in table.items():
            if key not in keys:
                raise UserError(f"{place}: field {name!r}: unknown key {key!r}; {nearest(key, keys)}")
            _require(isinstance(value, dict), place, name, f"an object under {key!r}", record)
    for tier, check in record.get("checks", {}).items():
        if not isinstance(check.get("name"), str):
            raise UserError(f"{place}: field 'checks.{tier}.name': expected the name of a check, found nothing")
    for answer, labels in record.get("labels", {}).items():
        for label, value in labels.items():
            if label not in LABELS or not isinstance(value, bool):
                raise UserError(
                    f"{place}: field 'labels.{answer}.{label}': expected true or false for one of {', '.join(LABELS)}"
                )
    tags = record.get("tags", {})
    _require(
        isinstance(tags, dict) and all(isinstance(value, str) for value in tags.values()),
        place, "tags", "an object of strings", record,
    )  # fmt: skip
