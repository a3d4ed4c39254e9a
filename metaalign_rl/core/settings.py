"""The parts of settings classes: documented fields, and checks of their values."""

from collections.abc import Sequence
from copy import copy
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import expand_path

Level = Literal["core", "advanced"]

PLAIN = "–"  # the unit of a number that has none
_KEY = "documentation"  # in a field's metadata


@dataclass(frozen=True, slots=True)
class Documentation:
    """The text about a field on the settings page and the command line.

    Attributes:
        meaning: one or two sentences.
        unit: the unit of a number, or `PLAIN`; empty for other types.
        level: "core" for the settings that most users change.
    """

    meaning: str
    unit: str = ""
    level: Level = "advanced"


def setting(default: Any, meaning: str, *, unit: str = "", level: Level = "advanced") -> Any:
    """A dataclass field with a default and its documentation. Each instance gets its own copy of a list or dict."""
    metadata = {_KEY: Documentation(meaning, unit, level)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def inherited(base: type, name: str, default: Any) -> Any:
    """A field of the class `base` with the same documentation and another default."""
    (found,) = (field for field in fields(base) if field.name == name)
    return field(default=default, metadata=found.metadata)


def documentation(field: "Field[Any]") -> Documentation:
    """A field's documentation; empty where the class gives none."""
    found: Documentation = field.metadata.get(_KEY, Documentation(""))
    return found


def require(key: str, good: bool, expected: str, found: Any) -> None:
    """Check one value.

    Raises:
        UserError: not `good`; says "KEY: expected EXPECTED, found FOUND".
    """
    if not good:
        raise UserError(f"{key}: expected {expected}, found {found!r}")


def expand_paths(section: Any, prefix: str, names: Sequence[str]) -> None:
    """Replace a leading `~` in each named path by the home folder, in place.

    Raises:
        UserError: see `expand_path`; names the setting.
    """
    for name in names:
        try:
            object.__setattr__(section, name, expand_path(getattr(section, name)))  # the sections are frozen
        except UserError as error:
            raise UserError(f"{prefix}{name}: {error}") from None


def require_at_least(section: Any, prefix: str, least: float, names: Sequence[str]) -> None:
    """Check that each named value is `least` or more. `prefix` comes before the name in the error, such as "ppo."."""
    for name in names:
        value = getattr(section, name)
        require(f"{prefix}{name}", value >= least, f"{least:g} or more", value)


def require_positive(section: Any, prefix: str, names: Sequence[str]) -> None:
    """Check that each named value is above 0."""
    for name in names:
        value = getattr(section, name)
        require(f"{prefix}{name}", value > 0, "a number above 0", value)


def require_options(section: Any, prefix: str) -> None:
    """Check that each field of a `Literal` type has one of its values."""
    for found in fields(section):
        if get_origin(found.type) is Literal:
            options, value = get_args(found.type), getattr(section, found.name)
            require(f"{prefix}{found.name}", value in options, f"one of {', '.join(map(str, options))}", value)
