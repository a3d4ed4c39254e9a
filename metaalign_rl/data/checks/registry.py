"""The registry of gold checks."""

from collections.abc import Callable, Collection
from typing import Any

from metaalign_rl.core.errors import UserError, nearest

CheckFunction = Callable[..., bool]
"""`check(answer, **arguments)`: whether the answer passes."""

ANY_TEXT: Collection[str] = ()
"""For `register`: the argument may be any text that is not empty."""

_CHECKS: dict[str, CheckFunction] = {}
_CHOICES: dict[str, dict[str, Collection[str]]] = {}  # check -> argument -> its allowed values


def register(name: str, **choices: Collection[str]) -> Callable[[CheckFunction], CheckFunction]:
    """Decorator: register a function as the check `name`, which rows can then use.

    Args:
        name: unique, such as "world.case".
        choices: by argument, its allowed values; `ANY_TEXT` allows any text that is not empty.
    """

    def add(function: CheckFunction) -> CheckFunction:
        assert name not in _CHECKS, f"the check {name!r} is registered twice"
        _CHECKS[name] = function
        _CHOICES[name] = choices
        return function

    return add


def run_check(spec: dict[str, Any], answer: str, place: str = "checks") -> bool:
    """Whether `answer` passes a row's check.

    Args:
        spec: the check as rows write it, `{"name": "world.case", "value": "upper"}`: its name and its arguments.
        place: names the check in errors.

    Raises:
        UserError: the check is unknown or does not accept its arguments.
    """
    arguments = {key: value for key, value in spec.items() if key != "name"}
    check = _find(spec["name"], place)
    for argument, choices in _CHOICES[spec["name"]].items():
        if argument in arguments:
            _require_choice(arguments[argument], choices, f"{place}: check {spec['name']!r}: {argument}")
    try:
        return bool(check(answer, **arguments))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{place}: check {spec['name']!r} with {arguments}: {error}") from error


def _find(name: str, place: str) -> CheckFunction:
    if name not in _CHECKS:
        raise UserError(f"{place}: unknown check {name!r}; {nearest(name, _CHECKS)}")
    return _CHECKS[name]


def _require_choice(value: Any, choices: Collection[str], place: str) -> None:
    if not isinstance(value, str) or not value:
        expected = f"one of {', '.join(choices)}" if choices else "a text"
        raise UserError(f"{place}: expected {expected}, found {value!r}")
    if choices and value not in choices:
        raise UserError(f"{place}: unknown value {value!r}; {nearest(value, choices)}")


@register("nothing")
def nothing(answer: str) -> bool:
    """The check of a tier whose text has no preference: every answer passes."""
    return True
