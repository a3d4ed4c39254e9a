"""The registry of gold checkers: programs that say whether an answer does what a tier asks."""

from collections.abc import Callable, Collection
from typing import Any

from metaalign_rl.core.errors import UserError, nearest

CheckFunction = Callable[..., bool]  # (answer, **arguments) -> does the answer satisfy it?

ANY_TEXT: Collection[str] = ()  # what `register` takes for an argument that may be any text that is not empty

_CHECKS: dict[str, CheckFunction] = {}
_CHOICES: dict[str, dict[str, Collection[str]]] = {}  # check -> argument -> the values that it may have


def register(name: str, **choices: Collection[str]) -> Callable[[CheckFunction], CheckFunction]:
    """Make a function a check that rows can name; `choices` are the texts that an argument may be."""

    def add(function: CheckFunction) -> CheckFunction:
        assert name not in _CHECKS, f"the check {name!r} is registered twice"
        _CHECKS[name] = function
        _CHOICES[name] = choices
        return function

    return add


def run_check(spec: dict[str, Any], answer: str, place: str = "checks") -> bool:
    """Whether `answer` passes the check that a row names, `{"name": …, ...arguments}`.

    Raises:
        UserError: an unknown check or arguments that it does not take; names `place`.
    """
    arguments = {key: value for key, value in spec.items() if key != "name"}
    check = find_check(spec["name"], place)
    for argument, choices in _CHOICES[spec["name"]].items():
        if argument in arguments:
            _require_choice(arguments[argument], choices, f"{place}: check {spec['name']!r}: {argument}")
    try:
        return bool(check(answer, **arguments))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{place}: check {spec['name']!r} with {arguments}: {error}") from error


def _require_choice(value: Any, choices: Collection[str], place: str) -> None:
    if not isinstance(value, str) or not value:
        expected = f"one of {', '.join(choices)}" if choices else "a text"
        raise UserError(f"{place}: expected {expected}, found {value!r}")
    if choices and value not in choices:
        raise UserError(f"{place}: unknown value {value!r}; {nearest(value, choices)}")


def find_check(name: str, place: str = "checks") -> CheckFunction:
    """The registered check, with every source's checks loaded."""
    import metaalign_rl.data.verih
    import metaalign_rl.data.world  # noqa: F401

    if name not in _CHECKS:
        raise UserError(f"{place}: unknown check {name!r}; {nearest(name, _CHECKS)}")
    return _CHECKS[name]


@register("nothing")
def nothing(answer: str) -> bool:
    """For a tier whose text asks for nothing: every answer satisfies it."""
    return True
