"""Load settings from a YAML file and `key=value` words into nested dataclasses, checked by type.

The field's type decides how a value is read, not YAML 1.1's guesses: `1e-3` is a number, `no` in a text field is the
text "no", and `yes` in a bool field is an error.
"""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from metaalign_rl.config.keys import Key, keys_of, nearest_keys
from metaalign_rl.config.yaml_values import IllTyped, convert, expected, is_null, shown, takes_text, type_name
from metaalign_rl.core import renamed_settings
from metaalign_rl.core.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Given:
    """A value that the user wrote, and its place: `file:line`, or the word in quotes."""

    node: yaml.Node
    place: str


@dataclass(frozen=True, slots=True)
class _Source:
    """A file or a word that settings are read from.

    Attributes:
        name: the file's path, or the word in quotes.
        keys: the keys that exist, by dotted name.
        has_lines: whether places name a line.
        accepts_old_names: whether renamed keys and values are read under their new names; else they are errors.
    """

    name: str
    keys: dict[str, Key]
    has_lines: bool = True
    accepts_old_names: bool = False

    def place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.has_lines else self.name


def load(cls: type[T], path: Path | None, overrides: list[str]) -> T:
    """A `cls` with its defaults, the file's values over them, and the words `dotted.key=value` over both.

    Raises:
        UserError: no such file, broken YAML, an unknown, renamed or repeated key, a value of the wrong type, a missing
            key, or a word without `=`. Names the place, the key, and the nearest key or the expected type.
    """
    return _load(cls, path, overrides, accepts_old_names=False)


def load_saved(cls: type[T], path: Path, overrides: list[str]) -> T:
    """Like `load`, from the `config.yaml` of a run's folder: keys of an earlier release are read under their new names.

    Raises:
        UserError: as `load`. An old key in `overrides` is still an error.
    """
    return _load(cls, path, overrides, accepts_old_names=True)


def dump(config: Any) -> str:
    """The settings as YAML, which `load` reads back to an equal object."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.dump(_plain(value), Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=1_000_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _load(cls: type[T], path: Path | None, overrides: list[str], *, accepts_old_names: bool) -> T:
    keys = keys_of(cls)
    given = _read_file(_Source(str(path), keys, accepts_old_names=accepts_old_names), path) if path is not None else {}
    for word in overrides:
        given |= _read_word(word, keys)
    return _build(cls, "", keys, given)


def _build(cls: type[T], prefix: str, keys: dict[str, Key], given: dict[str, _Given]) -> T:
    values: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        name = prefix + field.name
        if keys[name].is_section:
            values[field.name] = _build(keys[name].annotation, f"{name}.", keys, given)
        elif name in given:
            values[field.name] = _value(name, keys[name].annotation, given[name])
        elif keys[name].default is MISSING:
            raise UserError(f"key {name!r} is missing: give it as {name}=<{type_name(keys[name].annotation)}>")
        else:
            values[field.name] = keys[name].default
    return cls(**values)


def _value(name: str, annotation: Any, given: _Given) -> Any:
    try:
        return convert(given.node, annotation)
    except IllTyped as error:
        wanted, found = expected(error.annotation), shown(error.node)
        raise UserError(f"{given.place}: key '{name}{error.inside}': expected {wanted}, found {found}") from None


# Reading: values as YAML nodes, which know their lines, by dotted key.


def _read_file(source: _Source, path: Path) -> dict[str, _Given]:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a YAML file of settings") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_line(error)}: not valid YAML ({_problem(error)})") from None
    given: dict[str, _Given] = {}
    if root is None:
        return given
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}:1: expected keys with values, found {shown(root)}")
    for name, value in _flatten(root, "", source):
        if name in given:
            raise UserError(f"{value.place}: key {name!r} is already set at {given[name].place}; remove one of the two")
        given[name] = value
    return given


def _read_word(word: str, keys: dict[str, Key]) -> dict[str, _Given]:
    name, equals, text = word.partition("=")
    source = _Source(repr(word), keys, has_lines=False)
    if not equals:
        raise UserError(f"{word!r}: expected key=value, such as run.name=mine")
    name = _known_name(name, source, source.name)
    if takes_text(keys[name].annotation) and text[:1] not in ("'", '"'):
        node: yaml.Node | None = yaml.ScalarNode("", text)  # the shell's text as it is, not as YAML would read it
    else:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise UserError(f"{word!r}: the value is not valid YAML ({_problem(error)})") from None
    node = node or yaml.ScalarNode("", "")
    if keys[name].is_section:
        _require_mapping(name, node, source.name)
        return dict(_flatten(node, f"{name}.", source))
    return {name: _given(name, node, source, source.name)}


def _flatten(mapping: yaml.Node, prefix: str, source: _Source) -> Iterator[tuple[str, _Given]]:
    """The values of a mapping by dotted key, with those of nested sections."""
    for key_node, node in mapping.value:
        place = source.place(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{place}: expected a key, found {shown(key_node)}")
        name = _known_name(prefix + key_node.value, source, place)
        if not source.keys[name].is_section:
            yield name, _given(name, node, source, place)
        elif not is_null(node):  # an empty section keeps its defaults
            _require_mapping(name, node, place)
            yield from _flatten(node, f"{name}.", source)


def _known_name(name: str, source: _Source, place: str) -> str:
    """The key's current name.

    Raises:
        UserError: the key is unknown, or was renamed and the source must use the new name.
    """
    if name in source.keys:
        return name
    renamed = renamed_settings.KEYS.get(name)
    if renamed not in source.keys:
        raise UserError(f"{place}: unknown key {name!r}; {nearest_keys(name, source.keys)}")
    if not source.accepts_old_names:
        raise UserError(f"{place}: {name!r} was renamed to {renamed!r}; use the new key")
    return renamed


def _given(name: str, node: yaml.Node, source: _Source, place: str) -> _Given:
    """The value of a key, with a renamed value under its current name.

    Raises:
        UserError: the value was renamed, and the source must use the new name.
    """
    new = renamed_settings.VALUES.get(name, {}).get(node.value) if isinstance(node, yaml.ScalarNode) else None
    if new is None:
        return _Given(node, place)
    if not source.accepts_old_names:
        raise UserError(f"{place}: {name}={node.value!r} was renamed to {new!r}; use the new value")
    return _Given(yaml.ScalarNode(node.tag, new), place)


def _require_mapping(name: str, node: yaml.Node, place: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{place}: key {name!r}: expected a section of keys, found {shown(node)}")


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]


# Writing.


class _Dumper(yaml.SafeDumper):
    """Quotes and escapes the line breaks that YAML knows besides the newline: unquoted, it folds them to a space."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(character in data for character in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as YAML's own tables and lists."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
