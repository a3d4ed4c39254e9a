"""Errors that a user can mend: they name the value, the place and the remedy."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave is wrong. Command lines print the message alone and exit with status 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, or all of them where none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
