"""Errors that the user can fix. Each message names the place, what was expected and found, and the fix."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

SHOWN = 20  # bad rows that an error names


class UserError(ValueError):
    """The user gave something wrong. Command lines print only the message and exit with status 2."""


class BadRows:
    """Collects the errors of many rows, so that the user sees them together."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Catch a `UserError` of one row."""
        try:
            yield
        except UserError as error:
            self._messages.append(str(error))

    def require_none(self) -> None:
        """Raise what was collected.

        Raises:
            UserError: the message of the one bad row; or the number of bad rows, and the first `SHOWN` messages.
        """
        count = len(self._messages)
        if count == 1:
            raise UserError(self._messages[0])
        if count:
            title = f"{count:,} bad rows" + (f", the first {SHOWN} of them" if count > SHOWN else "")
            raise UserError("\n  ".join([f"{title}:", *self._messages[:SHOWN]]))


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the most similar known name, or all known names if none is similar."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
