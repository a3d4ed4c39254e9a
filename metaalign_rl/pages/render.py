"""Render a page from its template."""

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, Undefined
from markupsafe import Markup


def render(template: str, script_data: Any = None, **values: Any) -> str:
    """Render a page as one HTML file. It loads no other file, so it can be shared alone.

    Args:
        template: name of the template, without `.html.jinja`.
        script_data: a JSON value for the page's script.
        values: the template's variables.

    Raises:
        ValueError: `script_data` holds NaN or an infinity.
        jinja2.TemplateNotFound: no such template.
    """
    return _environment().get_template(f"{template}.html.jinja").render(data=_script_json(script_data or {}), **values)


def _environment() -> Environment:
    loader = PackageLoader("metaalign_rl.pages", "")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["asset"] = _asset
    environment.filters["decimal"] = _decimal
    return environment


def _asset(name: str) -> Markup:
    return Markup((files("metaalign_rl.pages") / name).read_text("utf-8"))


def _decimal(value: float | Undefined | None, digits: int = 2) -> str:
    return "–" if value is None or isinstance(value, Undefined) else f"{value:.{digits}f}"


def _script_json(value: Any) -> Markup:
    """JSON that is safe inside a <script> element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
