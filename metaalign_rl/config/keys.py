"""The keys of a settings class, by dotted name, and the nearest ones to a name that is none."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from metaalign_rl.core.settings import Documentation, documentation

_SECTION_WEIGHT = 0.5  # weight of the section's similarity, compared with the last part's
_NEAR = 0.6  # similarity of last parts from which a key is suggested


@dataclass(frozen=True, slots=True)
class Key:
    """One key: a section (a nested dataclass) or a value. A required value's default is `MISSING`."""

    annotation: Any
    default: Any
    documentation: Documentation

    @property
    def is_section(self) -> bool:
        return is_dataclass(self.annotation)


def keys_of(cls: type) -> dict[str, Key]:
    """Every key of `cls` by dotted name. A section comes before its keys."""
    return dict(_walk(cls, MISSING, ""))


def _walk(cls: type, instance: Any, prefix: str) -> Iterator[tuple[str, Key]]:
    """The keys under `prefix`. `instance` is the owner's default section; its values may differ from the class's."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        default = getattr(instance, field.name) if instance is not MISSING else field.default
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        key = Key(hints[field.name], default, documentation(field))
        yield prefix + field.name, key
        if key.is_section:
            yield from _walk(key.annotation, default, f"{prefix}{field.name}.")


def nearest_keys(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown dotted key: the nearest keys of all sections, or else all keys of its section."""
    names = list(known)
    scores = {key: _similarity(name, key) for key in names}
    best = max(scores.values())
    if best > 0:
        near = [repr(key) for key in names if scores[key] == best][:4]
        return f"did you mean {' or '.join(near)}?"
    section = name.rpartition(".")[0]
    here = [key for key in names if key.rpartition(".")[0] == section] or [key for key in names if "." not in key]
    return f"known: {', '.join(here)}"


def _similarity(name: str, key: str) -> float:
    """How similar two dotted keys are: by their last parts, then by their sections; 0 if the last parts differ much."""
    section, _, last = name.rpartition(".")
    key_section, _, key_last = key.rpartition(".")
    initials = "".join(part[0] for part in key_last.split("_") if part)
    if last == key_last or (len(initials) > 1 and last == initials):  # `lr` is learning_rate
        similarity = 1.0
    else:
        similarity = difflib.SequenceMatcher(None, last, key_last).ratio()
    if similarity < _NEAR:
        return 0.0
    return similarity + _SECTION_WEIGHT * difflib.SequenceMatcher(None, section, key_section).ratio()
