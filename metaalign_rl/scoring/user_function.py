"""A user's own reward, `reward.function: path/to/file.py:name`: a Python function that reads whole rows.

    def polite(rows: list[Row], answers: list[str]) -> list[float]:
        return [float("please" in answer) for row, answer in zip(rows, answers)]

It is called with parts of a step, and by `ppo.reward_workers` processes side by side: it must not count on seeing all
answers of a step, or of a prompt, at once.
"""

import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError, nearest

MODULE = "metaalign_rl_reward_function"  # the name that the file's module goes by


def absolute(function: str) -> str:
    """The same function from whatever folder it is loaded."""
    path, _, name = function.rpartition(":")
    return f"{Path(path).absolute()}:{name}"


class UserFunction:
    """A function of the user's, loaded once, whose every answer is checked."""

    def __init__(self, function: str) -> None:
        """Load `path/to/file.py:name`.

        Raises:
            UserError: there is no such file or function, or the file cannot be imported.
        """
        self._what = f"reward.function {function}"
        path, _, name = function.rpartition(":")
        module = self._load(Path(path))
        found = getattr(module, name, None)
        if not callable(found):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            hint = nearest(name, known) if known else "it has none"
            raise UserError(f"{self._what}: the file has no function {name!r}; {hint}")
        self._call: Callable[[list[Row], list[str]], Any] = found

    def __call__(self, rows: list[Row], answers: list[str]) -> list[float]:
        """The reward of each answer to its row, finite.

        Raises:
            UserError: the function raised an error, gave another number of rewards, or one that is no number; names
                the function, the row and the value.
        """
        try:
            found = self._call(rows, answers)
        except Exception as error:
            raise UserError(f"{self._what}: {_describe(error)} on {self._culprit(rows, answers)}") from error
        if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != len(rows):
            size = f" of {len(found)}" if hasattr(found, "__len__") else ""
            raise UserError(
                f"{self._what}: expected a list of {len(rows)} numbers, one a row, found {type(found).__name__}{size} "
                f"for {_span(rows)}"
            )
        return [self._number(value, row) for value, row in zip(found, rows, strict=True)]

    def _load(self, path: Path) -> ModuleType:
        if not path.is_file():
            raise UserError(f"{self._what}: {path}: no such file; give one as path/to/file.py:name")
        spec = importlib.util.spec_from_file_location(MODULE, path)
        if spec is None or spec.loader is None:
            raise UserError(f"{self._what}: {path}: expected a Python file, whose name ends in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[MODULE] = module  # dataclasses look their module up there
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"{self._what}: importing the file failed: {_describe(error)}") from error
        return module

    def _culprit(self, rows: list[Row], answers: list[str]) -> str:
        """The first row that the function cannot take by itself."""
        for row, answer in zip(rows, answers, strict=True):
            try:
                self._call([row], [answer])
            except Exception:
                return f"row {row.id!r} with answer {answer[:80]!r}"
        return f"{_span(rows)}, though on none of them alone"

    def _number(self, value: Any, row: Row) -> float:
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(f"{self._what}: row {row.id!r}: expected a finite number, found {value!r}"[:400])
        return float(value)


def _span(rows: Sequence[Row]) -> str:
    return f"rows {rows[0].id!r} to {rows[-1].id!r}" if rows else "no rows"


def _describe(error: Exception) -> str:
    """What was raised, and by which line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (line {frame.lineno} of {Path(frame.filename).name})"
