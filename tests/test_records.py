"""Data files of every kind: JSON lines, JSON arrays, Parquet and gzip are read; other kinds are refused by name."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaalign_rl.cli import main
from metaalign_rl.core.errors import BadRows, UserError
from metaalign_rl.core.records import read_records
from metaalign_rl.core.rows import parse_row, read_rows

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
ROW: dict[str, Any] = {
    "id": "1", "family": "helpful", "relation": "user_only", "tier": "user", "system_info": "",
    "user_info": "I am ten.", "messages": QUESTION, "chosen": "a", "rejected": "b",
}  # fmt: skip


def lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def parquet(records: list[dict[str, Any]], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)


WRITERS: dict[str, Callable[[list[dict[str, Any]], Path], object]] = {
    "rows.jsonl": lambda records, path: path.write_bytes(lines(records)),
    "crlf.jsonl": lambda records, path: path.write_bytes(b"\xef\xbb\xbf" + lines(records).replace(b"\n", b"\r\n\r\n")),
    "rows.json": lambda records, path: path.write_text(json.dumps(records, indent=2)),
    "bom.json": lambda records, path: path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(records).encode()),
    "rows.parquet": parquet,
    "rows.jsonl.gz": lambda records, path: path.write_bytes(gzip.compress(lines(records))),
    "rows.json.gz": lambda records, path: path.write_bytes(gzip.compress(json.dumps(records).encode())),
    "misnamed.jsonl": parquet,
}
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_every_kind_of_file_gives_the_rows_that_were_written(
    name: str, texts: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    records = [
        ROW | {"id": str(index), "user_info": user, "chosen": chosen} for index, (user, chosen) in enumerate(texts)
    ]
    path = tmp_path_factory.mktemp("rows") / name
    WRITERS[name](records, path)
    assert [row.to_json() for row in read_rows(path)] == [parse_row(record, "").to_json() for record in records]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (lines([ROW]).decode().encode("utf-16"), "found UTF-16 text, as PowerShell writes it; save it as UTF-8"),
        (lines([ROW]).decode().encode("utf-16-le"), "found a binary file or UTF-16 text"),
        (b"PK\x03\x04rest", "found a zip archive or an Excel sheet; unpack it"),
        (b"ARROW1\0\0", "found an Arrow or Feather file; write it as Parquet"),
        (b"\xff\xff\xff\xff\x10\0", "found an Arrow file of a saved data set"),
        (b"<!DOCTYPE html>", "found a web page; download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer to the file; run `git lfs pull`"),
        (b"\r".join([json.dumps(ROW).encode()] * 2), "its lines end with CR alone"),
        (json.dumps(ROW, indent=1).encode(), ":1: not valid JSON .* spreads over several lines"),
        (b"id,prompt\n1,why\n", "expected one JSON object per line (.jsonl), a JSON array (.json) or Parquet"),
        (b"[{", "begins like a JSON array but is not valid JSON"),
        (b'["text"]', "row 1: expected a JSON object, found str"),
        (b"PAR1 cut off", "the Parquet file is incomplete or broken"),
        (gzip.compress(lines([ROW] * 99), mtime=0)[:40], "the gzip file is incomplete or broken"),
        (b"", "the file holds no rows"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_it_is(content: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_rows(path))
    assert str(path) in str(error.value)
    pieces = found.split(" .* ")
    assert all(piece in str(error.value) for piece in pieces)


def test_columns_of_another_schema_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "openrlhf.jsonl"
    path.write_bytes(lines([{"prompt": "Why?", "chosen": "a", "rejected": "b"}]))
    with pytest.raises(UserError, match="openrlhf.jsonl:1: unknown field 'prompt'"):
        list(read_rows(path))


# Nulls


@pytest.mark.parametrize(
    "changes",
    [
        {"system_info": None},
        {"response": None, "strength": None, "checks": None, "labels": None, "tags": None},
        {"tags": {"kind": "tone", "split": None}},
        {"checks": {"system": None, "user": None}, "labels": {"response": None, "chosen": {"system": None}}},
        {"messages": [{"role": "user", "content": "Why is the sky blue?", "tool_calls": None}]},
        {"id": 1},
    ],
)
def test_a_null_counts_as_left_out(changes: dict[str, Any]) -> None:
    expected = parse_row(ROW, "row")
    found = parse_row(ROW | changes, "row")
    assert (found.id, found.system_info, found.messages) == ("1", "", expected.messages)
    assert (found.response, found.strength, found.checks) == (None, None, {})
    assert None not in found.tags.values()


def test_a_null_where_a_value_is_needed_is_still_an_error() -> None:
    for name in ("id", "messages", "tier"):
        with pytest.raises(UserError, match=f"field {name!r}: expected .*, found nothing"):
            parse_row(ROW | {name: None}, "row")


def test_rows_of_unlike_fields_survive_a_table(tmp_path: Path) -> None:
    records = [
        ROW | {"tags": {"kind": "case"}, "labels": {"chosen": {"system": True}}},
        {name: value for name, value in ROW.items() if name != "user_info"} | {"id": "2", "tags": {"split": "train"}},
    ]
    parquet(records, tmp_path / "rows.parquet")
    one, other = read_rows(tmp_path / "rows.parquet")
    assert (one.tags, other.tags) == ({"kind": "case"}, {"split": "train"})
    assert (one.labels, other.labels, other.user_info) == ({"chosen": {"system": True}}, {}, "")


# Bad rows


def test_all_bad_rows_of_a_file_are_named_up_to_20_with_their_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad: list[Any] = [
        ROW | {"id": "2", "rejected": " a\n"},
        ROW | {"id": "3", "labels": {"response": {"overall": True}}},
        ROW | {"id": "4", "tier": "sistem"},
        ROW,  # its id is taken
    ]
    (tmp_path / "pairs.jsonl").write_bytes(lines([ROW, *bad]) + b"{broken\n")
    assert main.main(["data", "validate", str(tmp_path / "pairs.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 5 bad rows:\n")
    for line, text in (
        (2, "found the same text"),
        (3, "no 'response'"),
        (4, "'tier'"),
        (5, "unique id"),
        (6, "not valid"),
    ):
        assert any(f"pairs.jsonl:{line}: " in part and text in part for part in error.splitlines()), (line, error)
    (tmp_path / "many.jsonl").write_bytes(lines([ROW | {"id": str(n), "rejected": "a"} for n in range(30)]))
    assert main.main(["data", "validate", str(tmp_path / "many.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 30 bad rows, the first 20 of them:\n")
    assert error.count("many.jsonl:") == 20


def test_one_bad_row_is_one_line() -> None:
    bad = BadRows()
    bad.require_none()
    with bad.collect():
        raise UserError("row 7: wrong")
    with pytest.raises(UserError, match=r"^row 7: wrong$"):
        bad.require_none()


def test_the_stage_data_refuses_what_validate_refuses_in_all_files(tmp_path: Path) -> None:
    from metaalign_rl.config.schema import Config, DataConfig, RunConfig
    from metaalign_rl.pipeline.stages import data

    (tmp_path / "pairs.jsonl").write_bytes(lines([ROW | {"rejected": "a"}]))
    parquet([ROW | {"labels": {"response": {"overall": True}}}], tmp_path / "held_out_pairs.parquet")
    config = Config(run=RunConfig(stages=["data"]), data=DataConfig(source="jsonl", path=str(tmp_path)))
    with pytest.raises(UserError) as error:
        data.run(config, tmp_path / "out")
    assert "2 bad rows" in str(error.value)
    assert "pairs.jsonl:1: field 'rejected'" in str(error.value)
    assert "held_out_pairs.parquet: row 1: field 'labels.response'" in str(error.value)
    (tmp_path / "pairs.json").write_text(json.dumps([ROW]))
    with pytest.raises(UserError, match="expected one file of pairs, found .*pairs.jsonl and .*pairs.json; remove one"):
        data.run(config, tmp_path / "out")


def test_records_are_read_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines([ROW]) + b"{broken\n")
    records = read_records(tmp_path / "rows.jsonl")
    assert next(records).read()["id"] == "1"
    broken = next(records)
    with pytest.raises(UserError, match="rows.jsonl:2: not valid JSON"):
        broken.read()
