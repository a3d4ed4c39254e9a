"""Imports go one way, jobs -> metaalign_rl -> reward -> the light core, and the command line starts light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = tuple(f"metaalign_rl.{name}" for name in ("meta_prompt", "schema", "files", "errors", "net", "refusals"))
ALGORITHM = {"ray", "vllm", "deepspeed", "openrlhf"}
HEAVY = {"torch", "transformers", "datasets", "numpy", "rich", *ALGORITHM}
THIN_JOBS = ("pipeline", "data", "sft", "reward", "ppo", "evaluate", "report")


def imports(path: Path, *, at_start: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, `a.b` for `from a import b`. At start: those outside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if at_start and node in lazy:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def under(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def file_of(name: str) -> Path | None:
    """The file of a module, of its own or of one whose member `name` is."""
    for module in (name, name.rpartition(".")[0]):
        base = ROOT / module.replace(".", "/")
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if module and path.is_file():
                return path
    return None


def loaded_at_start(names: tuple[str, ...]) -> set[str]:
    """Everything that importing these modules imports, through this repository's own modules."""
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = file_of(name) if name.startswith(("metaalign_rl", "reward")) else None
        if path:
            waiting += imports(path, at_start=True)
    return seen


@pytest.mark.parametrize("path", under("reward"), ids=lambda path: path.name)
def test_reward_knows_only_itself_and_the_light_core(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in {*ALGORITHM, "jobs"}, f"{path} imports {name}"
        if name.startswith("metaalign_rl"):
            assert name.startswith(tuple(f"{module}." for module in CORE)) or name in CORE, f"{path} imports {name}"


@pytest.mark.parametrize("path", under("metaalign_rl"), ids=lambda path: path.name)
def test_metaalign_rl_knows_no_job(path: Path) -> None:
    assert not [name for name in imports(path) if name.split(".")[0] == "jobs"]


@pytest.mark.parametrize("name", THIN_JOBS)
def test_a_job_is_a_few_lines_over_metaalign_rl(name: str) -> None:
    path = ROOT / "jobs" / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 15
    assert set(imports(path)) == {"sys", "metaalign_rl.job.run_stages"}


def test_what_a_job_imports_first_imports_no_module_that_a_script_beside_it_hides() -> None:
    scripts = {path.stem for path in under("jobs")}
    assert not {name.split(".")[0] for name in loaded_at_start(("metaalign_rl.job",))} & scripts


@pytest.mark.parametrize("module", [*CORE, "metaalign_rl.cli", "metaalign_rl.config", "metaalign_rl.runtime"])
def test_the_light_core_and_the_command_line_load_nothing_heavy(module: str) -> None:
    loaded = {name.split(".")[0] for name in loaded_at_start((module,))}
    assert not loaded & HEAVY
    if module in CORE:
        assert "reward" not in loaded


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom metaalign_rl.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    print('loaded:', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.partition("loaded: ")[2].split()}
    assert "metaalign_rl" in loaded
    assert not loaded & HEAVY
