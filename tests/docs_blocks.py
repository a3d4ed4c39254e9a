"""The fenced code blocks of the documentation, and the commands in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])

_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>\w+) -->\n)?(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
_HERE_DOCUMENT = re.compile(r"(<<'(\w+)'\n).*?^\2$", re.DOTALL | re.MULTILINE)
_OURS = re.compile(
    r"(?:\$ )?(?:[A-Z_]+=\S* )*(?P<words>(?:metaalign-rl|metaalign-reward|ray job submit|python jobs/) ?.*)"
)


@dataclass(frozen=True)
class Block:
    """A fenced code block: its page, its language, and the word in a comment above it, if there is one."""

    page: Path
    language: str
    mark: str
    text: str


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """The page's blocks in these languages. "" means a block without a language."""
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if found["language"] in languages:
            yield Block(page, found["language"], found["mark"] or "", found["text"])


def commands(page: Path) -> Iterator[str]:
    """The project's commands on a page, each on one line, without prompts, variables and here-documents."""
    for block in blocks(page, "bash", "console", ""):
        text = _HERE_DOCUMENT.sub(r"\1", block.text).replace("\\\n", " ")
        for line in map(str.strip, text.splitlines()):
            if found := _OURS.match(line):
                yield found["words"]
