"""The settings in the order in which users read about them: first the core ones, then the others by section."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass

from metaalign_rl.config.keys import Key, keys_of
from metaalign_rl.config.loader import flow
from metaalign_rl.config.yaml_values import type_name

WIDEST = (40, 24, 20, 20)  # characters of the columns; a longer cell moves only the rest of its own line


@dataclass(frozen=True, slots=True)
class Group:
    """Settings under one heading.

    Attributes:
        section: the section's name; empty for the core settings and for keys without a section.
        meaning: one sentence about the group.
        keys: the settings by dotted name.
    """

    section: str
    meaning: str
    keys: dict[str, Key]


def groups(cls: type) -> Iterator[Group]:
    """The core settings, then each section's advanced ones. Every setting is in one group."""
    values = {name: key for name, key in keys_of(cls).items() if not key.is_section}
    core = {name: key for name, key in values.items() if key.documentation.level == "core"}
    if core:
        yield Group("", "The core settings, which most runs set.", core)
    by_section: dict[str, dict[str, Key]] = {}
    for name, key in values.items():
        if name not in core:
            by_section.setdefault(name.rpartition(".")[0], {})[name] = key
    for section, keys in by_section.items():
        yield Group(section, section_meaning(cls, section), keys)


def section_meaning(cls: type, section: str) -> str:
    """The first line of the docstring of a section's class; of `cls` for the section ""."""
    owner = keys_of(cls)[section].annotation if section else cls
    return (owner.__doc__ or "").partition("\n")[0]


def describe(cls: type) -> str:
    """The settings for a terminal: `key  type  default  unit  meaning`, a line for each, under headings with #."""
    found = list(groups(cls))
    cells = {name: _cells(name, key) for group in found for name, key in group.keys.items()}
    widths = [min(max(len(row[column]) for row in cells.values()), widest) for column, widest in enumerate(WIDEST)]
    parts = []
    for group in found:
        title = f"# {group.section}: {group.meaning}" if group.section else f"# {group.meaning}"
        lines = ("  ".join(map(str.ljust, cells[name], [*widths, 0])).rstrip() for name in group.keys)
        parts.append("\n".join([title, *lines]))
    return "\n\n".join(parts)


def _cells(name: str, key: Key) -> tuple[str, ...]:
    default = "(required)" if key.default is MISSING else flow(key.default)
    return name, type_name(key.annotation), default, key.documentation.unit, key.documentation.meaning
