"""Fixtures that several files share; the tiny trained run is the dear one."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from metric_pages import Seen
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "model.hidden_size=64", "model.layers=1", "model.heads=2",
    "data.demonstrations=600", "data.pairs=200", "data.prompts=120", "data.held_out_prompts=48",
    "data.held_out_pairs=120", "data.paraphrased_wishes=10", "sft.save_steps=10", "reward.on_policy_prompts=24",
    "reward.epochs=1", "ppo.steps=6", "ppo.prompts_per_step=8", "ppo.samples_per_prompt=2", "ppo.save_steps=2",
    "ppo.deterministic=true", "learner.minibatch_size=8",
]  # fmt: skip

SESSION = pytest.StashKey[pytest.Session]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[SESSION] = session


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End the process at once: threads that gloo and Ray leave behind can crash an interpreter on its way out."""
    if session := config.stash.get(SESSION, None):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(session.exitstatus)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the trained tiny run is slow."""
    for item in items:
        if "watched_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def load_script(path: Path) -> ModuleType:
    """A Python file that is no module of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metaalign_rl(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, from the repository's root."""
    command = [sys.executable, "-m", "metaalign_rl", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


@pytest.fixture(scope="session")
def watched_run(tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, Seen]":
    """The folder of one whole run of the real stack, every stage, at a tiny size; and what was seen of it.

    Processes that test side by side share it.
    """
    from metric_pages import Seen

    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "runs"
    with FileLock(f"{root}.lock"):
        if not (root / "seen.json").is_file():
            run_tiny(root)
    return root / "tiny", Seen.read(root / "seen.json")


def run_tiny(root: Path) -> None:
    """Make the run `root/tiny`, and write what was seen of it to `root/seen.json`."""
    from metric_pages import watch

    root.mkdir()
    words = ["run", "configs/quickstart.yaml", *TINY, "run.name=tiny", f"run.root={root}"]
    environment = {**os.environ, "RAY_metrics_report_interval_ms": "1000"}
    with (root / "log").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "metaalign_rl", *words], stdout=log, stderr=log, cwd=ROOT, env=environment
        )
        seen = watch(run)
    assert run.returncode == 0, (root / "log").read_text()
    seen.write(root / "seen.json")


@pytest.fixture(scope="session")
def tiny_run(watched_run: "tuple[Path, Seen]") -> Path:
    """The run's folder."""
    return watched_run[0]


@pytest.fixture(scope="session")
def seen(watched_run: "tuple[Path, Seen]") -> "Seen":
    """What was seen of the run from outside."""
    return watched_run[1]


@pytest.fixture(scope="session")
def installed() -> "dict[str, PreTrainedTokenizerFast]":
    """Tokenizers of several formats with the meta-prompt's template."""
    from meta_prompt_toys import MAKERS

    from metaalign_rl.core.meta_prompt import install

    tokenizers = {name: make_one() for name, make_one in MAKERS.items()}
    for tokenizer in tokenizers.values():
        install(tokenizer)
    return tokenizers


@pytest.fixture(scope="session")
def reloaded(
    installed: "dict[str, PreTrainedTokenizerFast]", tmp_path_factory: pytest.TempPathFactory
) -> "dict[str, PreTrainedTokenizerFast]":
    """What a server sees of them: the saved files alone."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in installed.items():
        tokenizer.save_pretrained(folder / name)
    return {name: AutoTokenizer.from_pretrained(folder / name) for name in installed}
