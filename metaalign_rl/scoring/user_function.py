"""A user's own reward: `reward.function: path/to/file.py:name`, a Python function that reads rows.

    def polite(rows: list[Row], answers: list[str]) -> list[float]:
        return [float("please" in answer) for row, answer in zip(rows, answers)]

A function with parameters named `finished` and `tokens` also gets how each answer ended: whether the model ended it
(else it was truncated), and its number of tokens.

    def brief(rows, answers, *, finished: list[bool], tokens: list[int]) -> list[float]: ...

It is called with chunks of a step, by `ppo.reward_workers` processes in parallel. It must not expect to see all
responses of a step, or of a prompt, in one call.
"""

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from metaalign_rl.core.dataflow import Ending, Row
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
        self._function: Callable[..., Any] = found
        self._wanted = _wanted_endings(found)

    def __call__(self, rows: list[Row], answers: list[str], endings: Sequence[Ending] | None = None) -> list[float]:
        """The reward of each answer to its row, a finite number.

        Args:
            endings: how the answers ended. None, if it is unknown: then the function gets None for `finished` and
                `tokens`.

        Raises:
            UserError: the function raised an error, or returned another count of rewards, or a reward that is not a
                finite number. Names the function, the row and the value.
        """
        try:
            found = self._call(rows, answers, endings)
        except Exception as error:
            raise UserError(f"{self._what}: {_describe(error)} on {self._culprit(rows, answers, endings)}") from error
        if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != len(rows):
            size = f" of {len(found)}" if hasattr(found, "__len__") else ""
            raise UserError(
                f"{self._what}: expected a list of {len(rows)} numbers, one per row, "
                f"found {type(found).__name__}{size} "
                f"for {_span(rows)}"
            )
        return [self._number(value, row) for value, row in zip(found, rows, strict=True)]

    def _call(self, rows: list[Row], answers: list[str], endings: Sequence[Ending] | None) -> Any:
        more = {name: endings and [getattr(ending, name) for ending in endings] for name in self._wanted}
        return self._function(rows, answers, **more)

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

    def _culprit(self, rows: list[Row], answers: list[str], endings: Sequence[Ending] | None) -> str:
        """The first row on which the function fails alone."""
        for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            try:
                self._call([row], [answer], endings and [endings[index]])
            except Exception:
                return f"row {row.id!r} with answer {answer[:80]!r}"
        return f"{_span(rows)}, but on none of them alone"

    def _number(self, value: Any, row: Row) -> float:
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(f"{self._what}: row {row.id!r}: expected a finite number, found {value!r}"[:400])
        return float(value)


def _wanted_endings(function: Callable[..., Any]) -> set[str]:
    """The names of `Ending`'s fields that are parameters of the function, after `rows` and `answers`."""
    try:
        more = list(inspect.signature(function).parameters.values())[2:]
    except ValueError:  # a built-in function has no signature
        return set()
    named = {found.name for found in more if found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)}
    return named & {"finished", "tokens"}


def _span(rows: Sequence[Row]) -> str:
    return f"rows {rows[0].id!r} to {rows[-1].id!r}" if rows else "no rows"


def _describe(error: Exception) -> str:
    """The error, and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (line {frame.lineno} of {Path(frame.filename).name})"
