"""Imports: jobs -> metaalign_rl -> reward -> core. The core and the command line import no heavy packages."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIGHT = (
    "arguments",
    "checkpoints",
    "chat_template",
    "dataflow",
    "errors",
    "files",
    "meta_prompt",
    "net",
    "refusals",
    "rows",
    "views",
)
CORE = tuple(f"metaalign_rl.core.{name}" for name in LIGHT)  # all modules without `batching`, which needs torch
ALGORITHM = {"ray", "vllm", "deepspeed", "openrlhf"}
HEAVY = {"torch", "transformers", "datasets", "numpy", "rich", *ALGORITHM}
THIN_JOBS = ("pipeline", "data", "sft", "reward", "ppo", "evaluate", "report")


def imports(path: Path, *, at_start: bool = False) -> Iterator[str]:
    """The dotted names that a file imports; `from a import b` gives `a.b`.

    Args:
        at_start: only those that are imported with the module: outside functions and `TYPE_CHECKING`.
    """
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
    """The file of a module, or of the module that has `name` as a member."""
    for module in (name, name.rpartition(".")[0]):
        base = ROOT / module.replace(".", "/")
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if module and path.is_file():
                return path
    return None


def loaded_at_start(names: tuple[str, ...]) -> set[str]:
    """All modules that importing `names` imports, also through this repository's own modules."""
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
def test_reward_imports_only_itself_and_the_core(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in {*ALGORITHM, "jobs"}, f"{path} imports {name}"
        if name.startswith("metaalign_rl"):
            assert name.startswith("metaalign_rl.core."), f"{path} imports {name}"


@pytest.mark.parametrize("path", under("metaalign_rl"), ids=lambda path: path.name)
def test_metaalign_rl_imports_no_job(path: Path) -> None:
    assert not [name for name in imports(path) if name.split(".")[0] == "jobs"]


@pytest.mark.parametrize("name", THIN_JOBS)
def test_a_job_is_a_short_script(name: str) -> None:
    path = ROOT / "jobs" / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 15
    assert set(imports(path)) == {"sys", "metaalign_rl.cli.job.run_stages"}


def test_what_a_job_imports_first_imports_no_module_that_a_script_next_to_it_hides() -> None:
    scripts = {path.stem for path in under("jobs")}
    assert (
        not {name.split(".")[0] for name in loaded_at_start(("metaalign_rl.cli.job", "metaalign_rl.openrlhf.script"))}
        & scripts
    )


@pytest.mark.parametrize(
    "module", [*CORE, "metaalign_rl.cli.main", "metaalign_rl.config.schema", "metaalign_rl.runtime.ray_session"]
)
def test_the_core_and_the_command_line_import_no_heavy_packages(module: str) -> None:
    loaded = {name.split(".")[0] for name in loaded_at_start((module,))}
    assert not loaded & HEAVY
    if module in CORE:
        assert "reward" not in loaded


def test_help_imports_no_heavy_packages() -> None:
    program = (
        "import sys\nfrom metaalign_rl.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    print('loaded:', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.partition("loaded: ")[2].split()}
    assert "metaalign_rl" in loaded
    assert not loaded & HEAVY


def test_evaluating_a_checkpoint_sets_rays_token_before_anything_imports_ray() -> None:
    program = """
import sys
from pathlib import Path
from metaalign_rl.cli import evaluate
from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Sampling
from metaalign_rl.runtime import ray_session

ray_session.connect = lambda config: sys.exit(f"imported: {'ray' in sys.modules}")
evaluate._judge_checkpoint(Path("policy"), [], Config(), Sampling())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.endswith("imported: False\n"), done.stderr
