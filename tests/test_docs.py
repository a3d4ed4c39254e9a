"""The documentation: the site builds, links and commands work, and settings and error texts match the code."""

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
    if page.name != "commands.md"  # generated from the parsers
    for command in commands(page)
]


@cache
def hooks() -> ModuleType:
    return load_script(DOCS / "hooks.py")


# --- the site ---


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The repository with a copy of the pages, which a test may change."""
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


def test_the_site_builds_without_warnings_and_loads_nothing_from_other_hosts(tree: Path) -> None:
    done = build(tree)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = list((tree / "build" / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", page.read_text())
        assert not loaded, page


def test_a_broken_link_and_a_page_without_a_menu_entry_fail_the_build(tree: Path) -> None:
    page = tree / "docs" / "ppo.md"
    links = "[a](nowhere.md) [b](faults.md#nothing) [c](../configs/none.yaml)"
    page.write_text(f"{page.read_text()}\n{links} [d](../configs/quickstart.yaml)\n")
    (tree / "docs" / "lost.md").write_text("# Lost\n")
    done = build(tree)
    assert done.returncode == 1
    for problem in ("'nowhere.md'", "'faults.md#nothing'", "no such file: ../configs/none.yaml", "lost.md"):
        assert re.search(f"WARNING.*{re.escape(problem)}|- {problem}", done.stderr), problem + done.stderr
    assert "configs/quickstart.yaml" not in done.stderr


def test_links_to_other_files_of_the_repository_need_its_address() -> None:
    def site(address: str | None) -> str:
        config = SimpleNamespace(docs_dir=str(DOCS), config_file_path=str(ROOT / "mkdocs.yml"), repo_url=address)
        page = SimpleNamespace(file=SimpleNamespace(abs_src_path=str(DOCS / "recipes" / "a.md"), src_uri="a.md"))
        text = "[A](../../README.md#two-commands) [B](../ppo.md)"
        found: str = hooks().on_page_markdown(text, page, config, None)
        return found

    assert site("https://host/me/fork/") == "[A](https://host/me/fork/blob/HEAD/README.md#two-commands) [B](../ppo.md)"
    assert site(None) == "A [B](../ppo.md)"


@pytest.mark.parametrize("name", GENERATED)
def test_the_generated_parts_of_a_page_are_up_to_date(name: str) -> None:
    page = DOCS / name
    assert hooks().generated(DOCS)[page] == page.read_text(encoding="utf-8"), "run `make docs` and commit the page"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")], ids=str)
def test_links_of_pages_outside_the_site_work(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


# --- settings ---


def test_the_settings_page_has_the_meaning_of_every_setting_and_the_unit_of_every_number() -> None:
    rows = {}
    for line in (DOCS / "settings.md").read_text(encoding="utf-8").splitlines():
        cells = re.split(r"(?<!\\)\|", line)
        if len(cells) == 7:
            rows[cells[1].strip(" `")] = [cell.strip() for cell in cells[2:6]]
    for name, key in loader.keys_of(Config).items():
        if not key.is_section:
            kind, _, unit, meaning = rows[name]
            assert meaning, f"{name}: write the meaning next to the field"
            assert unit or not re.search(r"`(int|float)`", kind), name


def test_the_settings_page_has_our_environment_variables() -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    for name in {name for part in fragments() for name in re.findall(r"METAALIGN_[A-Z_]+", part)}:
        assert f"`{name}`" in text, name


# --- commands ---


def check_command(command: str) -> None:
    """Parse a command and load its settings, as the program does."""
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
            pass  # OpenRLHF's options, which tests/test_openrlhf_job.py checks
        case ["python", script, "--config", config, *rest]:
            assert (ROOT / script).is_file()
            load(Path(config), rest)
        case _:
            pytest.fail(f"unknown command: {words}")


def load(config: Path | None, words: list[str]) -> None:
    """Load the settings of a command. Files that the reader writes may be missing."""
    words = [os.path.expandvars(word) for word in words]  # as the user's shell does it
    named = config is not None and config.parts[0] == "configs" and config.name != "mine.yaml"
    loader.load(Config, ROOT / config if named and config else None, words)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_on_the_pages_exist_with_their_options_and_settings(command: str) -> None:
    check_command(command)


def test_a_command_that_does_not_exist_is_detected() -> None:
    with pytest.raises(SystemExit):
        check_command("metaalign-rl run configs/quickstart.yaml --fast")
    with pytest.raises(ValueError, match="unknown key"):
        check_command("metaalign-rl run configs/quickstart.yaml ppo.lr=1")


def test_the_manifests_on_the_pages_exist() -> None:
    for page in PAGES:
        for path in re.findall(
            r"cluster/overlays/(?!mine)[\w-]+", page.read_text(encoding="utf-8")
        ):  # the reader writes cluster/overlays/mine
            assert (ROOT / path / "kustomization.yaml").is_file(), f"{page.name}: {path}"


@pytest.mark.parametrize("block", [b for page in PAGES for b in blocks(page, "python")], ids=lambda b: b.page.name)
def test_python_on_the_pages_compiles_and_imports_existing_names(block: Block) -> None:
    for statement in ast.walk(ast.parse(block.text)):
        if isinstance(statement, ast.ImportFrom) and str(statement.module).split(".")[0] in PACKAGES:
            module = importlib.import_module(str(statement.module))
            assert all(hasattr(module, name.name) for name in statement.names), ast.unparse(statement)


# --- errors ---


@cache
def fragments() -> frozenset[str]:
    """The string constants in the source, including the constant parts of f-strings."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    return frozenset(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def is_printable(text: str) -> bool:
    """Whether the program can print `text`: a part of one fragment, or an end, complete ones and a beginning."""
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
        reached += [end for end in ends if end not in done and is_fragment(text[at:end])]
    return False


def is_fragment(text: str) -> bool:
    """Whether `text` is a fragment. Short fragments count only if they are punctuation: letters could form any text."""
    return text in fragments() and (len(text) > 5 or not re.search(r"\w", text))


@pytest.mark.parametrize("block", [block for block in TROUBLES if block.mark != "theirs"], ids=lambda b: b.text[:50])
def test_the_program_can_print_each_error_of_the_troubleshooting_page(block: Block) -> None:
    for part in filter(None, (part.strip() for part in block.text.split("…"))):
        assert is_printable(part), part


def test_an_error_that_the_program_cannot_print_is_detected() -> None:
    assert len(TROUBLES) >= 40
    assert is_printable("cluster.memory_gib: needs") and not is_printable("cluster.memory_gib: wants")
    assert not is_printable("has no check of its tier any more")
