"""Hooks for mkdocs: write the generated pages, and check and rewrite the links that leave docs/.

Links to other files of the repository work unchanged where the repository is browsed. On the site they lead to
`repo_url`. Without it they become plain text.
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

from metaalign_rl.cli import main as cli
from metaalign_rl.config import settings_page
from reward import cli as reward_cli

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = """# Commands

<!-- docs/hooks.py writes this page from the parsers. `make docs` updates it. -->

This page lists the help of both commands and of their subcommands. `metaalign-reward` needs no Ray, vLLM or DeepSpeed.
"""

_FENCED = re.compile(r"^(```.*?^```$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\.?/[^)#\s]*)(#[^)\s]*)?\)")
_PLAN = re.compile(
    r"(?P<command>^\$ (?P<words>metaalign-rl plan (?:.*\\\n)*.*\n))(?P<output>(?:(?!```).*\n)*)", re.MULTILINE
)

log = logging.getLogger("mkdocs.hooks")


def on_pre_build(config: Any) -> None:
    """Update the generated pages. They are committed, so that they can be read without the site."""
    for path, text in generated(Path(config.docs_dir)).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links that leave docs/. A link to a missing file is a warning, which fails with `--strict`."""
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
    """Return the current text of every page that a program writes or whose output it shows."""
    pages = {docs / "settings.md": settings_page.render(), docs / "commands.md": commands()}
    for name in ("sizing.md", "plan.md"):
        pages[docs / name] = _PLAN.sub(_planned, (docs / name).read_text(encoding="utf-8"))
    return pages


def _planned(block: re.Match[str]) -> str:
    """Return a shown `metaalign-rl plan` command with its current output."""
    output = io.StringIO()
    words = shlex.split(block["words"].replace("\\\n", " "))[1:]
    with redirect_stdout(output), chdir(ROOT):
        status = cli.main(words)
    assert status == 0, f"metaalign-rl {shlex.join(words)}: expected exit status 0, found {status}"
    return block["command"] + output.getvalue()


def commands() -> str:
    """Return the help of every command of both programs as Markdown."""
    parsers = (*_leaves(cli._parser()), *_leaves(reward_cli._parser()))
    with patch.dict(os.environ, COLUMNS="100"):
        parts = [f"## {parser.prog}\n\n```\n{parser.format_help().strip()}\n```" for parser in parsers]
    return "\n\n".join([COMMANDS.strip(), *parts]) + "\n"


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser and the parsers of its commands, in the order of the help."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _leaves(child)
