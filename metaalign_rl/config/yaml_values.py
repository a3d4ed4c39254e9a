"""Convert a YAML node to a value of an annotated type, and describe types and nodes in error messages."""

import re
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NULL = ("", "~", "null", "Null", "NULL")
_BOOL = {text: text.lower() == "true" for text in ("true", "True", "TRUE", "false", "False", "FALSE")}
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


class IllTyped(Exception):
    """A node that does not fit its annotation. `inside` is its place in the value, such as `[1]` or `.user`."""

    def __init__(self, annotation: Any, node: yaml.Node, inside: str = "") -> None:
        self.annotation, self.node, self.inside = annotation, node, inside


def convert(node: yaml.Node, annotation: Any) -> Any:
    """The node's value, converted to the type `annotation`.

    Raises:
        IllTyped: the node does not fit the type.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return _convert_union(node, annotation)
    if origin is Literal:
        for option in arguments:
            if isinstance(node, yaml.ScalarNode) and _matches(node, option):
                return option
        raise IllTyped(annotation, node)
    if origin is dict:
        return _convert_dict(node, annotation)
    if origin in (list, tuple):
        return _convert_sequence(node, annotation)
    return _convert_scalar(node, annotation)


def _convert_scalar(node: yaml.Node, kind: type) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise IllTyped(kind, node)
    text, plain = node.value, node.style is None
    if kind is str and (not plain or not text or text not in _NULL):
        return text
    if kind is NoneType and is_null(node):
        return None
    if kind is bool and plain and text in _BOOL:
        return _BOOL[text]
    if kind is int and plain and _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if kind is float and plain and _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if kind is float and plain and (match := _INFINITY.fullmatch(text)):
        return float(match[1] + "inf")
    raise IllTyped(kind, node)


def _convert_union(node: yaml.Node, annotation: Any) -> Any:
    # None comes first, so that `null` is None for `str | None`, not the text "null".
    for member in sorted(get_args(annotation), key=lambda member: member is not NoneType):
        try:
            return convert(node, member)
        except IllTyped:
            continue
    raise IllTyped(annotation, node)


def _convert_sequence(node: yaml.Node, annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    fixed = origin is tuple and arguments[-1] is not Ellipsis
    if not isinstance(node, yaml.SequenceNode) or (fixed and len(node.value) != len(arguments)):
        raise IllTyped(annotation, node)
    kinds = arguments if fixed else (arguments[0],) * len(node.value)
    return origin(
        _inside(f"[{index}]", item, kind) for index, (item, kind) in enumerate(zip(node.value, kinds, strict=True))
    )


def _convert_dict(node: yaml.Node, annotation: Any) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise IllTyped(annotation, node)
    values: dict[str, Any] = {}
    for key_node, item in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.value in values:
            raise IllTyped(annotation, key_node)
        values[key_node.value] = _inside(f".{key_node.value}", item, get_args(annotation)[1])
    return values


def _inside(step: str, node: yaml.Node, annotation: Any) -> Any:
    try:
        return convert(node, annotation)
    except IllTyped as error:
        raise IllTyped(error.annotation, error.node, step + error.inside) from None


def _matches(node: yaml.ScalarNode, option: Any) -> bool:
    if isinstance(option, str):
        return bool(node.value == option)
    try:
        return bool(_convert_scalar(node, type(option)) == option)
    except IllTyped:
        return False


def is_null(node: yaml.Node) -> bool:
    """Whether the node is an unquoted null."""
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULL


def takes_text(annotation: Any) -> bool:
    """Whether the type has texts among its values."""
    if get_origin(annotation) in (Union, UnionType):
        return any(takes_text(member) for member in get_args(annotation))
    return annotation is str or get_origin(annotation) is Literal


def expected(annotation: Any) -> str:
    """Describe the values of a type, for an error message."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(expected(member) for member in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is dict:
        return f"a table {{key: {expected(arguments[1])}, …}} ({type_name(annotation)})"
    if origin in (list, tuple):
        items = ", ".join("…" if kind is Ellipsis else expected(kind) for kind in arguments)
        return f"a list [{items}] ({type_name(annotation)})"
    return f"{_NAMES[annotation]} ({type_name(annotation)})" if annotation is not NoneType else "null"


def type_name(annotation: Any) -> str:
    """The type's name for users, such as "int | null"."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(type_name, get_args(annotation)))
    if get_args(annotation):
        arguments = ("..." if kind is Ellipsis else type_name(kind) for kind in get_args(annotation))
        return f"{get_origin(annotation).__name__}[{', '.join(arguments)}]"
    return "null" if annotation is NoneType else str(annotation.__name__)


def shown(node: yaml.Node) -> str:
    """The node for an error message; at most 80 characters of its text."""
    if isinstance(node, yaml.MappingNode):
        return "a table"
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    assert isinstance(node, yaml.ScalarNode)
    if is_null(node):
        return "nothing"
    return ("" if node.style is None else "the text ") + repr(node.value)[:80]
