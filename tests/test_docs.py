"""The documentation: it builds, its links and commands hold, and what it says of settings and errors is in the code."""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT, load_script
from docs_blocks import DOCS, PAGES, Block, blocks, commands

from metaalign_rl.cli import main
from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from reward import cli as reward_cli

PACKAGES = ("metaalign_rl", "reward", "jobs")
GENERATED = ("settings.md", "commands.md", "sizing.md", "plan.md")
TROUBLES = list(blocks(DOCS / "troubleshooting.md", "text"))
COMMANDS = [
    pytest.param(command, id=f"{page.relative_to(ROOT)}: {command[:60]}")
    for page in PAGES
    if page.name != "commands.md"  # made of the parsers' own texts
    for command in commands(page)
]


@cache
def hooks() -> ModuleType:
    return load_script(DOCS / "hooks.py")


# --- the site ---


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The repository, with pages of its own that may be changed."""
    for path in ROOT.iterdir():
        if path.name not in ("docs", "build", "mkdocs.yml"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    return tmp_path


def build(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def test_the_site_builds_without_a_warning_and_its_pages_load_nothing_from_elsewhere(tree: Path) -> None:
    done = build(tree)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = list((tree / "build" / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", page.read_text())
        assert not loaded, page


def test_a_broken_link_fails_the_build_and_so_does_a_page_that_no_menu_has(tree: Path) -> None:
    page = tree / "docs" / "ppo.md"
    links = "[a](nowhere.md) [b](faults.md#nothing) [c](../configs/none.yaml)"
    page.write_text(f"{page.read_text()}\n{links} [d](../configs/quickstart.yaml)\n")
    (tree / "docs" / "lost.md").write_text("# Lost\n")
    done = build(tree)
    assert done.returncode == 1
    for problem in ("'nowhere.md'", "'faults.md#nothing'", "no such file: ../configs/none.yaml", "lost.md"):
        assert re.search(f"WARNING.*{re.escape(problem)}|- {problem}", done.stderr), problem + done.stderr
    assert "configs/quickstart.yaml" not in done.stderr


def test_a_link_out_of_the_docs_leads_to_the_repository_where_that_has_an_address() -> None:
    def site(address: str | None) -> str:
        config = SimpleNamespace(docs_dir=str(DOCS), config_file_path=str(ROOT / "mkdocs.yml"), repo_url=address)
        page = SimpleNamespace(file=SimpleNamespace(abs_src_path=str(DOCS / "recipes" / "a.md"), src_uri="a.md"))
        text = "[A](../../README.md#two-commands) [B](../ppo.md)"
        found: str = hooks().on_page_markdown(text, page, config, None)
        return found

    assert site("https://host/me/fork/") == "[A](https://host/me/fork/blob/HEAD/README.md#two-commands) [B](../ppo.md)"
    assert site(None) == "A [B](../ppo.md)"


@pytest.mark.parametrize("name", GENERATED)
def test_what_programs_write_of_a_page_is_up_to_date(name: str) -> None:
    page = DOCS / name
    assert hooks().generated(DOCS)[page] == page.read_text(encoding="utf-8"), "run `make docs` and commit the page"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")], ids=str)
def test_links_of_pages_beside_the_site_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


# --- settings ---


def test_every_setting_stands_on_its_page_with_a_meaning_and_a_unit_where_it_is_a_number() -> None:
    rows = {}
    for line in (DOCS / "settings.md").read_text(encoding="utf-8").splitlines():
        cells = re.split(r"(?<!\\)\|", line)
        if len(cells) == 7:
            rows[cells[1].strip(" `")] = [cell.strip() for cell in cells[2:6]]
    for name, key in loader.keys_of(Config).items():
        if not key.is_section:
            kind, _, unit, meaning = rows[name]
            assert meaning, f"{name}: say beside the field what it means"
            assert unit or not re.search(r"`(int|float)`", kind), name


def test_every_environment_variable_of_ours_stands_there_too() -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    for name in {name for part in fragments() for name in re.findall(r"METAALIGN_[A-Z_]+", part)}:
        assert f"`{name}`" in text, name


# --- commands ---


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shown_command_exists_with_its_options_and_settings(command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "ray":
        words = words[words.index("--") + 1 :]
    match words:
        case ["metaalign-rl", *rest]:
            args = main._parse(main._parser(), rest)
            load(getattr(args, "config", None), getattr(args, "words", []))
        case ["metaalign-reward", *rest]:
            reward_cli._parser().parse_args(rest)
        case ["python", "jobs/openrlhf.py", *_]:
            pass  # its options are OpenRLHF's; tests/test_openrlhf_job.py has them
        case ["python", script, "--config", config, *rest]:
            assert (ROOT / script).is_file()
            load(Path(config), rest)
        case _:
            pytest.fail(f"not understood: {words}")


def load(config: Path | None, words: list[str]) -> None:
    """The settings that a command has; files that the reader is to write may be missing."""
    named = config is not None and config.parts[0] == "configs" and config.name != "mine.yaml"
    loader.load(Config, ROOT / config if named and config else None, words)


def test_a_command_that_does_not_exist_would_be_found() -> None:
    with pytest.raises(SystemExit):
        test_a_shown_command_exists_with_its_options_and_settings("metaalign-rl run configs/quickstart.yaml --fast")
    with pytest.raises(ValueError, match="unknown key"):
        test_a_shown_command_exists_with_its_options_and_settings("metaalign-rl run configs/quickstart.yaml ppo.lr=1")


def test_manifests_that_are_named_exist() -> None:
    for page in PAGES:
        for path in re.findall(
            r"cluster/overlays/(?!mine)[\w-]+", page.read_text(encoding="utf-8")
        ):  # the reader's own
            assert (ROOT / path / "kustomization.yaml").is_file(), f"{page.name}: {path}"


@pytest.mark.parametrize("block", [b for page in PAGES for b in blocks(page, "python")], ids=lambda b: b.page.name)
def test_shown_python_compiles_and_imports_what_there_is(block: Block) -> None:
    for statement in ast.walk(ast.parse(block.text)):
        if isinstance(statement, ast.ImportFrom) and str(statement.module).split(".")[0] in PACKAGES:
            module = importlib.import_module(str(statement.module))
            assert all(hasattr(module, name.name) for name in statement.names), ast.unparse(statement)


# --- errors ---


@cache
def fragments() -> frozenset[str]:
    """The constant texts of the source, those of f-strings between their values."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    return frozenset(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def is_said(text: str) -> bool:
    """Whether the program can say `text`: a part of a fragment, or the end of one, whole ones, the beginning of one."""
    if any(text in part for part in fragments()):
        return True
    reached = [0] + [at for at in range(4, len(text)) if any(part.endswith(text[:at]) for part in fragments())]
    done: set[int] = set()
    while reached:
        at = reached.pop()
        done.add(at)
        if any(part.startswith(text[at:]) for part in fragments()):
            return True
        ends = range(at + 1, len(text) + 1)
        reached += [end for end in ends if end not in done and is_whole(text[at:end])]
    return False


def is_whole(text: str) -> bool:
    """Whether `text` is a fragment; a short one only if it is punctuation, or anything could be made of them."""
    return text in fragments() and (len(text) > 5 or not re.search(r"\w", text))


@pytest.mark.parametrize("block", [block for block in TROUBLES if block.mark != "theirs"], ids=lambda b: b.text[:50])
def test_an_error_on_the_troubleshooting_page_is_one_that_the_program_can_say(block: Block) -> None:
    for part in filter(None, (part.strip() for part in block.text.split("…"))):
        assert is_said(part), part


def test_an_error_that_the_program_cannot_say_would_be_found() -> None:
    assert len(TROUBLES) >= 40
    assert is_said("cluster.memory_gib: needs") and not is_said("cluster.memory_gib: wants")
    assert not is_said("has no check of its tier any more")
