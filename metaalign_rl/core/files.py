"""Reading and writing the project's files: nothing half-written is ever seen under a final name."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from metaalign_rl.core.errors import UserError


def write_with(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file, then give it the name `path`: what stands there is always a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, atomically."""
    write_with(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a log, at a cost that does not grow with it.

    What a writer that was killed left of its last line is cut off first; `read_log` passes it over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        _cut_torn_line(file)
        file.write(f"{json.dumps(record, ensure_ascii=False)}\n".encode())


def _cut_torn_line(file: BinaryIO) -> None:
    if size := file.seek(0, os.SEEK_END):
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The objects that `append_jsonl` wrote, without a last line that was cut off; nothing where there is no file."""
    if path.is_file():
        with path.open("rb") as file:
            yield from (json.loads(line) for line in file if line.endswith(b"\n"))


def read_json(path: Path) -> Any:
    """The value in a JSON file; a missing or broken file is a `UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's number (from 1) and object. Blank lines are passed over.

    Raises:
        UserError: no such file, a line that is not UTF-8 JSON, or one that is not an object; with file and line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
            yield number, record


def replace_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Build a folder with `fill(temporary)`, then rename it to `path`: a folder there is always a whole one.

    What stands at `path` already is renamed aside first, so that a crash between the two renames leaves nothing
    there. What writers that died left beside `path` is removed: a folder has one writer at a time.
    """
    sweep(path.parent, path.name, "part")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.mkdir(parents=True)
    fill(temporary)
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    sweep(path.parent, path.name, "old")


def remove_folder(path: Path) -> None:
    """Remove a folder: it is whole or gone under its name, whenever the process dies."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(old)
    sweep(path.parent, path.name, "old")


def sweep(parent: Path, names: str, *endings: str) -> None:
    """Remove what `replace_folder` and `remove_folder` left, if they died, of folders whose name fits a pattern.

    Args:
        names: as `fnmatch` has it, such as "step-*".
        endings: "part", of folders not finished, or "old", of those that are no more; both if none is given.
    """
    litter = re.compile(rf"\.(?P<name>.+)\.\d+\.({'|'.join(endings or ('part', 'old'))})")
    for folder in parent.glob(".*"):
        if (found := litter.fullmatch(folder.name)) and fnmatchcase(found["name"], names):
            shutil.rmtree(folder)
