"""What settings say of themselves: what each field means, and what an unknown key was meant for."""

import ast
import difflib
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterable
from functools import cache

_SECTION_WEIGHT = 0.5  # of a key's section beside its own name, in how near a key is
_NEAR = 0.6  # likeness of names from which a key is worth suggesting
_ATTRIBUTE = re.compile(r"( *)(\w+(?:, \w+)*): (.*)")


@cache
def meanings(cls: type) -> dict[str, str]:
    """Meaning by field name: the comment beside the field, else its entry under `Attributes:`."""
    source = textwrap.dedent(inspect.getsource(cls))
    return _attributes(inspect.cleandoc(cls.__doc__ or "")) | _comments(source)


def nearest_keys(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown dotted key: the nearest known ones, anywhere, or all of its section."""
    names = list(known)
    scores = {key: _likeness(name, key) for key in names}
    best = max(scores.values())
    if best > 0:
        near = [repr(key) for key in names if scores[key] == best][:4]
        return f"did you mean {' or '.join(near)}?"
    section = name.rpartition(".")[0]
    here = [key for key in names if key.rpartition(".")[0] == section] or [key for key in names if "." not in key]
    return f"known: {', '.join(here)}"


def _likeness(name: str, key: str) -> float:
    """How near `key` is to `name`: by its last part, then by its section; 0 where the last are unlike."""
    section, _, last = name.rpartition(".")
    key_section, _, key_last = key.rpartition(".")
    initials = "".join(part[0] for part in key_last.split("_") if part)
    if last == key_last or (len(initials) > 1 and last == initials):  # `lr` is learning_rate
        alike = 1.0
    else:
        alike = difflib.SequenceMatcher(None, last, key_last).ratio()
    if alike < _NEAR:
        return 0.0
    return alike + _SECTION_WEIGHT * difflib.SequenceMatcher(None, section, key_section).ratio()


def _comments(source: str) -> dict[str, str]:
    """The comments that stand on the lines of annotated fields, by field name."""
    by_line = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
            if text := " ".join(by_line[line] for line in lines if line in by_line):
                found[statement.target.id] = text
    return found


def _attributes(docstring: str) -> dict[str, str]:
    """The entries of a docstring's `Attributes:`; lines indented deeper go on with the entry above."""
    found: dict[str, str] = {}
    names: list[str] = []
    indent = 0
    for line in docstring.partition("Attributes:\n")[2].splitlines():
        if line.strip() and not line.startswith(" "):
            break  # the next section
        match = _ATTRIBUTE.match(line)
        if match and (not names or len(match[1]) <= indent):
            names, indent = match[2].split(", "), len(match[1])
            found |= dict.fromkeys(names, match[3])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
