"""Reads the records of a data file, whatever it is: JSON lines, a JSON array or Parquet, each also with gzip."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from metaalign_rl.core.errors import UserError

EXPECTED = "expected one JSON object per line (.jsonl), a JSON array (.json) or Parquet, each also with gzip, in UTF-8"
_GZIP, _PARQUET, _MARK = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"
# Other kinds of files by their first bytes.
_OTHERS = {
    b"\xff\xfe": "UTF-16 text, as PowerShell writes it; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"\xff\xff\xff\xff": "an Arrow file of a saved data set; write it with Dataset.to_json or to_parquet",
    b"ARROW1": "an Arrow or Feather file; write it as Parquet",
    b"PK\x03\x04": "a zip archive or an Excel sheet; unpack it, or save the sheet as Parquet",
    b"\x28\xb5\x2f\xfd": "a file compressed with zstd; decompress it",
    b"BZh": "a file compressed with bzip2; decompress it",
    b"\xfd7zXZ": "a file compressed with xz; decompress it",
    b"\x80\x04": "a pickle, which can run code; write it as Parquet",
    b"SQLite format 3": "a SQLite database; write the table as Parquet",
    b"version https://git-lfs": "a Git LFS pointer to the file; run `git lfs pull`",
    b"<!DOCTYPE": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}


class Record(NamedTuple):
    """One record of a file.

    Attributes:
        place: the file and the line, such as "rows.jsonl:3", or the number of the row.
        read: gives the record. Raises a `UserError` that names the place if it is not a JSON object.
    """

    place: str
    read: Callable[[], dict[str, Any]]


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file. Blank lines are skipped. The file's content decides how it is read, not its name.

    JSON lines are read one by one. A JSON array and a column chunk of Parquet are in memory as a whole.

    Raises:
        UserError: the file is missing, or of another kind; says what it is.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(2)
    try:
        with gzip.open(path) if start == _GZIP else path.open("rb") as file:
            yield from _records(file, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is incomplete or broken ({error}); copy it again") from None


def _records(file: Any, path: Path) -> Iterator[Record]:
    start = file.read(64)
    file.seek(0)
    if start.startswith(_PARQUET):
        return _parquet(file, path)
    _refuse_other_kinds(start, path)
    text = start.removeprefix(_MARK).lstrip()
    return _array(file, path) if text.startswith(b"[") else _lines(file, path)


def _refuse_other_kinds(start: bytes, path: Path) -> None:
    for mark, kind in _OTHERS.items():
        if start.startswith(mark):
            found, _, remedy = kind.rpartition("; ")
            raise UserError(f"{path}: {EXPECTED}, found {found}; {remedy}")
    if b"\0" in start:
        raise UserError(f"{path}: {EXPECTED}, found a binary file or UTF-16 text; save it as UTF-8")


def _lines(file: Any, path: Path) -> Iterator[Record]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield Record(place, partial(_parse_object, line, place))


def _parse_object(line: bytes, place: str) -> dict[str, Any]:
    return _object(_parse(line, place), place)


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        if b"\r" in line.strip():
            hint = "its lines end with CR alone; end them with LF: tr '\\r' '\\n'"
        elif line.strip() == b"{":
            hint = "an object spreads over several lines; write each object on one line, or all of them as an array"
        else:
            hint = EXPECTED
        raise UserError(f"{place}: not valid JSON ({error}); {hint}") from None


def _array(file: Any, path: Path) -> Iterator[Record]:
    try:
        values = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: it begins like a JSON array but is not valid JSON ({error}); {EXPECTED}") from None
    return _numbered(values, path)


def _parquet(file: Any, path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow, or write JSON lines") from None
    try:
        table = ParquetFile(file)
        rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
        yield from _numbered(rows, path)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: the Parquet file is incomplete or broken ({error}); copy it again") from None


def _numbered(values: Iterable[Any], path: Path) -> Iterator[Record]:
    for number, value in enumerate(values, start=1):
        place = f"{path}: row {number}"
        yield Record(place, partial(_object, value, place))


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object, found {type(value).__name__}")
    return value
