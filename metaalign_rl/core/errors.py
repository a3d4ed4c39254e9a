"""Errors that the user can fix. Each message names the place, what was expected and found, and the fix."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user gave something wrong. Command lines print only the message and exit with status 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the most similar known name, or all known names if none is similar."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
