"""Filling a page's template: what all pages have in common."""

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, Undefined
from markupsafe import Markup


def render(template: str, script_data: Any = None, **values: Any) -> str:
    """A page as HTML. It loads nothing, so it can be sent to a colleague as it is.

    Args:
        script_data: what the page's script draws from.
    """
    return _environment().get_template(f"{template}.html.jinja").render(data=_script_json(script_data or {}), **values)


def _environment() -> Environment:
    loader = PackageLoader("metaalign_rl.pages", "")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["asset"] = _asset
    environment.filters["figure"] = _figure
    return environment


def _asset(name: str) -> Markup:
    return Markup((files("metaalign_rl.pages") / name).read_text("utf-8"))


def _figure(value: float | Undefined | None, digits: int = 2) -> str:
    return "–" if value is None or isinstance(value, Undefined) else f"{value:.{digits}f}"


def _script_json(value: Any) -> Markup:
    """JSON that may stand inside a <script> element, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
