"""Loads public data sets with the `datasets` library, from the hub or from a local folder or file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaalign_rl.core.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
TRAIN, HELD_OUT = "train", ("validation", "test")


@dataclass(frozen=True, slots=True)
class Record:
    """One published row.

    Attributes:
        id: part, split and number of the row; unique in the data set.
        place: the row's data set, split and number, for error messages.
        part: the part of the data set that the row is from; empty if there are no parts.
        values: the row's values by column.
    """

    id: str
    place: str
    part: str
    values: Mapping[str, Any]

    def text(self, field: str, *, may_be_empty: bool = False) -> str:
        """The text in a column.

        Raises:
            UserError: the value is not a text, or the text is blank and not `may_be_empty`.
        """
        value = self.values[field]
        if not isinstance(value, str) or not (may_be_empty or value.strip()):
            raise self._wrong(field, "a text")
        return value

    def number(self, field: str, most: int) -> int:
        """The integer in a column.

        Raises:
            UserError: the value is not an integer from 0 to `most`.
        """
        value = self.values[field]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise self._wrong(field, f"a whole number from 0 to {most}")
        return value

    def _wrong(self, field: str, expected: str) -> UserError:
        value = self.values[field]
        shown = "nothing" if value is None else repr(value)[:80]
        return UserError(f"{self.place}: field {field!r}: expected {expected}, found {shown}")


@dataclass(frozen=True, slots=True)
class Table:
    """One split of a data set, or of a part of a data set."""

    place: str
    part: str
    split: str
    data: "Dataset"

    @property
    def is_held_out(self) -> bool:
        return self.split in HELD_OUT

    def records(self) -> Iterator[Record]:
        """The rows in their published order, numbered from 1."""
        name = "-".join(filter(None, (self.part, self.split)))
        for number, values in enumerate(self.data, start=1):
            yield Record(f"{name}-{number}", f"{self.place}: row {number}", self.part, values)


def load(path: str, columns: Sequence[str], parts: Sequence[str] = ()) -> list[Table]:
    """Load every split of a data set.

    Args:
        path: an existing folder or file (JSON, JSONL, Parquet or CSV, by its ending); otherwise a hub id.
        columns: the columns to read. The data set may have others.
        parts: the folders of a data set whose rows do not name their part. A local `path` may also be one of these
            folders, or a file in one.

    Raises:
        UserError: the data set does not exist or cannot be loaded, has a split of another name, or lacks a column.
    """
    tables = []
    for part, folder in _folders(path, parts).items():
        for split, data in _load(path, folder).items():
            place = f"{'/'.join(filter(None, (path, folder)))} ({split})"
            _check(data.column_names, columns, split, place)
            tables.append(Table(place, part, split, data.select_columns(list(columns))))
    return tables


def _folders(path: str, parts: Sequence[str]) -> dict[str, str | None]:
    """By part, the folder inside `path` to load; None loads `path` itself."""
    if not parts:
        return {"": None}
    if not Path(path).exists():
        return {part: part for part in parts}
    inside = [part for part in parts if (Path(path) / part).is_dir()]
    if inside:
        return {part: part for part in inside}
    for name in reversed(Path(path).absolute().parts):
        for part in parts:
            if name.startswith(part):
                return {part: None}
    raise UserError(
        f"data.path: expected a folder that holds {' or '.join(parts)}, or a folder or file of that name, found "
        f"{path!r}; give one, as the path must name the part of the data set"
    )


def _load(path: str, folder: str | None) -> "DatasetDict":
    import datasets

    kind, arguments = _arguments(path, folder)
    try:
        return datasets.load_dataset(**arguments)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, StopIteration) as error:
        reason = (str(error.__cause__ or error).partition("\n")[0] or "it is empty").rstrip(".")
        raise UserError(
            f"data.path: cannot load {path!r}, taken for {kind}: {reason}; give the data set as it was published, "
            "as a hub id or, where the hub cannot be reached, as the folder of a copy"
        ) from None


def _arguments(path: str, folder: str | None) -> tuple[str, dict[str, str | None]]:
    """The kind of `path` in words, and the arguments of `datasets.load_dataset` for it."""
    local = Path(path)
    if local.is_file():
        ending = Path(local.name.removesuffix(".gz")).suffix
        if ending not in FORMATS:
            raise UserError(f"data.path: expected a file that ends with {', '.join(FORMATS)}, found {path!r}")
        return "a file", {"path": FORMATS[ending], "data_files": path}
    if local.is_dir():  # a part's own folder: `datasets` would apply the card above it to the wrong folder
        return "a folder", {"path": str((local / (folder or "")).absolute())}
    if path.count("/") != 1:
        raise UserError(f"data.path: expected a folder or file that exists, or a hub id (owner/name), found {path!r}")
    return "a hub id", {"path": path, "data_dir": folder}


def _check(found: Sequence[str], columns: Sequence[str], split: str, place: str) -> None:
    if split not in (TRAIN, *HELD_OUT):
        raise UserError(f"{place}: expected a split {TRAIN}, {' or '.join(HELD_OUT)}, found {split}; rename its files")
    if not set(columns) <= set(found):
        raise UserError(
            f"{place}: expected the columns {', '.join(columns)}, found {', '.join(found)}; "
            "data.source and data.path must name the same data set"
        )
