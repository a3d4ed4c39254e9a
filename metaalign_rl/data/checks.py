"""The registry of gold checkers: programs that say whether an answer does what a tier asks."""

from collections.abc import Callable
from typing import Any

from metaalign_rl.errors import UserError, nearest

Check = Callable[..., bool]  # (answer, **arguments) -> does the answer satisfy it?

_CHECKS: dict[str, Check] = {}


def register(name: str) -> Callable[[Check], Check]:
    """Make a function a check that rows can name."""

    def add(function: Check) -> Check:
        assert name not in _CHECKS, f"the check {name!r} is registered twice"
        _CHECKS[name] = function
        return function

    return add


def run_check(spec: dict[str, Any], answer: str, place: str = "checks") -> bool:
    """Whether `answer` passes the check that a row names, `{"name": …, ...arguments}`.

    Raises:
        UserError: an unknown check or arguments that it does not take; names `place`.
    """
    arguments = {key: value for key, value in spec.items() if key != "name"}
    check = find_check(spec["name"], place)
    try:
        return bool(check(answer, **arguments))
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: check {spec['name']!r} with {arguments}: {error}") from None


def find_check(name: str, place: str = "checks") -> Check:
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
