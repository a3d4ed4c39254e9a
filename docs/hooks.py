"""What mkdocs does beside building these pages: it writes the generated ones and checks the links that leave docs/.

Links to the repository's other files work as they stand where the repository is browsed. On the site they lead to
`repo_url`; without one they are plain text.
"""

import argparse
import io
import logging
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from metaalign_rl.cli import main
from metaalign_rl.config import settings_page
from reward import cli as reward_cli

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = """# Commands

<!-- docs/hooks.py writes this page from the parsers; `make docs` brings it up to date. -->

Two commands come with the package; `metaalign-reward` needs no Ray, vLLM or DeepSpeed.
"""

_FENCED = re.compile(r"^(```.*?^```$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\.?/[^)#\s]*)(#[^)\s]*)?\)")
_PLAN = re.compile(
    r"(?P<command>^\$ (?P<words>metaalign-rl plan (?:.*\\\n)*.*\n))(?P<output>(?:(?!```).*\n)*)", re.MULTILINE
)

log = logging.getLogger("mkdocs.hooks")


def on_pre_build(config: Any) -> None:
    """Bring the generated pages up to date; they are committed, so that they can be read without the site."""
    for path, text in generated(Path(config.docs_dir)).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links that leave docs/; one to a file that is not there is a warning, which `--strict` fails."""
    source, docs, root = Path(page.file.abs_src_path), Path(config.docs_dir), Path(config.config_file_path).parent

    def rewrite(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / link[2]))
        if target.is_relative_to(docs):
            return link[0]  # mkdocs checks these
        if not target.exists():
            log.warning("%s: no such file: %s", page.file.src_uri, link[2])
        if not config.repo_url:
            return link[1]
        return f"[{link[1]}]({config.repo_url.rstrip('/')}/blob/HEAD/{target.relative_to(root)}{link[3] or ''})"

    parts = _FENCED.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(rewrite, part) for part in parts)


def generated(docs: Path) -> dict[Path, str]:
    """Every page that is written by a program, or holds a program's output, as it should be."""
    pages = {docs / "settings.md": settings_page.render(), docs / "commands.md": commands()}
    for name in ("sizing.md", "plan.md"):
        pages[docs / name] = _PLAN.sub(_planned, (docs / name).read_text(encoding="utf-8"))
    return pages


def _planned(block: re.Match[str]) -> str:
    """A shown `metaalign-rl plan` with what it prints."""
    output = io.StringIO()
    words = shlex.split(block["words"].replace("\\\n", " "))[1:]
    with redirect_stdout(output), chdir(ROOT):
        status = main.main(words)
    assert status == 0, f"metaalign-rl {shlex.join(words)} ended with {status}"
    return block["command"] + output.getvalue()


def commands() -> str:
    """The help of every command of both programs, in Markdown."""
    parsers = (*_leaves(main._parser()), *_leaves(reward_cli._parser()))
    with patch.dict(os.environ, COLUMNS="100"):
        parts = [f"## {parser.prog}\n\n```\n{parser.format_help().strip()}\n```" for parser in parsers]
    return "\n\n".join([COMMANDS.strip(), *parts]) + "\n"


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its commands, in the order of the help."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _leaves(child)
