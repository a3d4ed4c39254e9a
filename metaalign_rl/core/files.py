"""Reading and writing files. Files and folders appear under their final names only when they are complete."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from metaalign_rl.core.errors import UserError


def expand_path(text: str) -> str:
    """The path with a leading `~` or `~name` replaced by that home folder, as a shell does for unquoted words.

    Raises:
        UserError: there is no such user, or a `$` begins a variable, which only a shell would expand.
    """
    if re.search(r"\$(\w|\{)", text):
        raise UserError(f"expected a path without variables, found {text!r}; write the folder's name out")
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise UserError(f"expected a path, found {text!r}, but there is no such user; write the folder's name out")
    return expanded


def write_with(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: `write` fills a temporary file, which is then renamed to `path`."""
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
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one line to a log. The cost does not grow with the log's length.

    If an earlier writer was killed in the middle of a line, that incomplete line is removed first.
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
    """The objects that `append_jsonl` wrote, without an incomplete last line; none if there is no file."""
    if path.is_file():
        with path.open("rb") as file:
            yield from (json.loads(line) for line in file if line.endswith(b"\n"))


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: the file is missing or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # RecursionError: too many levels of lists or objects
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number (from 1) and the object of each line. Blank lines are skipped.

    Raises:
        UserError: the file is missing, or a line is not a JSON object in UTF-8; names file and line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
            yield number, record


def replace_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a folder: `fill(temporary)` builds it, then it is renamed to `path`. It is complete under this name.

    A folder that is already at `path` is first renamed, then removed. If the process dies between the two renames,
    there is no folder at `path`. Leftovers of writers that died are removed, so a folder must have one writer at a
    time.
    """
    sweep(path.parent, path.name, "part")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.mkdir(parents=True)
    fill(temporary)
    _share(temporary)
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    sweep(path.parent, path.name, "old")


def _share(folder: Path) -> None:
    """Let others read a new folder's files where the umask allows it. safetensors writes them for the owner only."""
    allowed = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with suppress(PermissionError):  # some file systems have no modes
                file.chmod(file.stat().st_mode | allowed)


def remove_folder(path: Path) -> None:
    """Remove a folder. Whenever the process dies, the folder is either complete under its name or gone."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(old)
    sweep(path.parent, path.name, "old")


def sweep(parent: Path, names: str, *endings: str) -> None:
    """Remove what `replace_folder` and `remove_folder` left in `parent` if they were interrupted.

    Args:
        names: the folders' names, as a pattern for `fnmatch` such as "step-*".
        endings: "part" for unfinished folders, "old" for replaced or removed ones; both by default.
    """
    leftover = re.compile(rf"\.(?P<name>.+)\.\d+\.({'|'.join(endings or ('part', 'old'))})")
    for folder in parent.glob(".*"):
        if (found := leftover.fullmatch(folder.name)) and fnmatchcase(found["name"], names):
            shutil.rmtree(folder)
