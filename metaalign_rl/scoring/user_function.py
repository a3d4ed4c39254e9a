"""A user's own reward: `reward.function: path/to/file.py:name`, a Python function that reads rows.

    def polite(rows: list[Row], answers: list[str]) -> list[float]:
        return [float("please" in answer) for row, answer in zip(rows, answers)]

It is called with chunks of a step, by `ppo.reward_workers` processes in parallel. It must not expect to see all
responses of a step, or of a prompt, in one call.
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

MODULE = "metaalign_rl_reward_function"  # name of the loaded module


def absolute(function: str) -> str:
    """The function with an absolute path, so that it can be loaded from any folder."""
    path, _, name = function.rpartition(":")
    return f"{Path(path).absolute()}:{name}"


class UserFunction:
    """The user's function, loaded once. Its results are checked."""

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
        """The reward of each answer to its row, a finite number.

        Raises:
            UserError: the function raised an error, or returned another count of rewards, or a reward that is not a
                finite number. Names the function, the row and the value.
        """
        try:
            found = self._call(rows, answers)
        except Exception as error:
            raise UserError(f"{self._what}: {_describe(error)} on {self._culprit(rows, answers)}") from error
        if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != len(rows):
            size = f" of {len(found)}" if hasattr(found, "__len__") else ""
            raise UserError(
                f"{self._what}: expected a list of {len(rows)} numbers, one per row, "
                f"found {type(found).__name__}{size} "
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
        sys.modules[MODULE] = module  # dataclasses look up their module there
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"{self._what}: importing the file failed: {_describe(error)}") from error
        return module

    def _culprit(self, rows: list[Row], answers: list[str]) -> str:
        """The first row on which the function fails alone."""
        for row, answer in zip(rows, answers, strict=True):
            try:
                self._call([row], [answer])
            except Exception:
                return f"row {row.id!r} with answer {answer[:80]!r}"
        return f"{_span(rows)}, but on none of them alone"

    def _number(self, value: Any, row: Row) -> float:
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(f"{self._what}: row {row.id!r}: expected a finite number, found {value!r}"[:400])
        return float(value)


def _span(rows: Sequence[Row]) -> str:
    return f"rows {rows[0].id!r} to {rows[-1].id!r}" if rows else "no rows"


def _describe(error: Exception) -> str:
    """The error, and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (line {frame.lineno} of {Path(frame.filename).name})"
