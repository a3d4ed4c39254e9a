"""Shared by several test files: the command line, a run of the complete stack, a local Ray, and the files' order."""

import importlib.metadata
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from watched_run import Seen

    from metaalign_rl.config.schema import Config

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "model.hidden_size=64", "model.layers=1", "model.heads=2",
    "data.demonstrations=600", "data.pairs=200", "data.prompts=120", "data.held_out_prompts=48",
    "data.held_out_pairs=120", "data.paraphrased_wishes=10", "sft.save_steps=10", "reward.on_policy_prompts=24",
    "reward.controls=[preference_blind, tier_blind]", "reward.epochs=1", "ppo.steps=6", "ppo.prompts_per_step=8",
    "ppo.samples_per_prompt=2", "ppo.save_steps=2", "ppo.deterministic=true", "ppo.evaluate_steps=2",
    "ppo.evaluate_rows=12", "learner.minibatch_size=8",
]  # fmt: skip

# In the tests' processes and in those that they start: a second thread only makes models of this size slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# The order of the files, and which worker runs them.

# The longest first, so that the workers end at about the same time.
FIRST = ("cluster", "resume", "tutorial", "serve", "browser", "ppo_benchmarks")
# These use `local_ray`: one worker runs them, in this order. Tests of test_runtime.py need that Ray does not run yet.
ON_LOCAL_RAY = ("runtime", "metrics", "rollout", "transfer", "faults", "reward_stage")
# These fork their ranks from a server that has imported DeepSpeed, which one worker starts.
RANKS = ("learner", "reward_ranks")


def group_of(path: str) -> str:
    """The test files that must run in the same worker have the same group."""
    name = Path(path).stem.removeprefix("test_")
    return next((str(group) for group in (ON_LOCAL_RAY, RANKS) if name in group), name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files, and mark what needs the tiny run as slow."""
    place = {f"test_{name}": index for index, name in enumerate((*FIRST, *RANKS, *ON_LOCAL_RAY))}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if "watched_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker a complete group at a time."""
    from xdist.scheduler import LoadFileScheduling

    class GroupScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    return GroupScheduling(config, log)


# Before the first test, and after the last.

SESSION = pytest.StashKey[pytest.Session]()
FORK_SERVERS = pytest.StashKey[list[subprocess.Popen[bytes]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Start the servers that fork Ray workers; the workers of xdist share them. See `startup/fork_server.py`."""
    if "FORK_SERVER" not in os.environ:
        os.environ["FORK_SERVER"] = f"{mkdtemp(prefix='tests-')}/forks"
        fork_server = load_script(ROOT / "tests" / "startup" / "fork_server.py")
        config.stash[FORK_SERVERS] = fork_server.start(os.environ["FORK_SERVER"])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop `local_ray`."""
    session.config.stash[SESSION] = session
    stop_ray()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Exit without cleaning up: threads of gloo and Ray can crash the interpreter while it shuts down."""
    if servers := config.stash.get(FORK_SERVERS, None):
        for server in servers:
            if server.poll() is not None:
                print("tests/startup/fork_server.py ended early: Ray workers started slowly", file=sys.stderr)
            server.kill()
            server.wait()
        rmtree(Path(os.environ["FORK_SERVER"]).parent, ignore_errors=True)
    if session := config.stash.get(SESSION, None):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(session.exitstatus)


# Helpers.


@pytest.fixture(scope="session", autouse=True)
def faster_starts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have the processes that the tests start import `startup/sitecustomize.py`."""
    packages = tmp_path_factory.mktemp("startup") / "packages.json"
    packages.write_text(json.dumps(importlib.metadata.packages_distributions()))
    os.environ["TEST_PACKAGES"] = str(packages)
    os.environ["PYTHONPATH"] = python_path(ROOT / "tests" / "startup")


def python_path(*first: Path) -> str:
    """PYTHONPATH with more folders before the present ones."""
    return os.pathsep.join(filter(None, [*map(str, first), os.environ.get("PYTHONPATH")]))


def free_port() -> int:
    """A TCP port on which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def load_script(path: Path) -> ModuleType:
    """Import a Python file that is not part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Done(NamedTuple):
    """The result of a command, with the names of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command line in this process, from the repository's root. A new process would take seconds to start."""
    from metaalign_rl.cli.main import main

    monkeypatch.chdir(ROOT)

    def run(*words: str) -> Done:
        capsys.readouterr()
        try:
            status = main(words)
        except SystemExit as exit_:  # from the parser
            status = int(exit_.code or 0)
        return Done(status, *capsys.readouterr())

    return run


# A run of the complete stack.


@pytest.fixture(scope="session")
def watched_run(tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, Seen]":
    """The folder of a tiny run of every stage, and what was seen of it while it ran. All workers share one run."""
    from watched_run import Seen

    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "runs"
    with FileLock(f"{root}.lock"):
        if not (root / "seen.json").is_file():
            run_tiny(root)
    return root / "tiny", Seen.read(root / "seen.json")


def run_tiny(root: Path) -> None:
    """Make the run `root/tiny`, and write `root/seen.json`."""
    from watched_run import watch

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
    """The observations of the run from outside."""
    return watched_run[1]


# Learners in the tests' own process.


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A learner makes its process a rank. The tests of other files must not be in one."""
    from learner_toys import own_process_group

    with own_process_group():
        yield


# A local Ray.


RAY = ExitStack()  # holds the connection of `local_ray`


def stop_ray() -> None:
    """Stop the Ray that `local_ray` started, if it still runs."""
    RAY.close()


@pytest.fixture(scope="module", autouse=True)
def no_ray_from_another_file(request: pytest.FixtureRequest) -> None:
    """A file that does not use `local_ray` begins without Ray."""
    if not any("local_ray" in item.fixturenames for item in request.session.items if item.module is request.module):
        stop_ray()


@pytest.fixture(scope="session")
def ray_config(tmp_path_factory: pytest.TempPathFactory) -> "Config":
    """The settings that `local_ray` is started with; they require little of the machine."""
    from metaalign_rl.config.schema import ClusterConfig, Config, RunConfig

    cluster = ClusterConfig(cpus=2, memory_gib=1.0, disk_gib=0.0)
    return Config(run=RunConfig(root=str(tmp_path_factory.mktemp("runs"))), cluster=cluster)


@pytest.fixture(scope="module")
def local_ray(ray_config: "Config") -> Iterator["Config"]:
    """A Ray of two CPUs on this machine, started by the project's own code. Files that follow each other share it."""
    import ray

    from metaalign_rl.runtime import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # as `connect` does
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        if not ray.is_initialized():
            RAY.enter_context(ray_session.connect(ray_config))
        yield ray_config


# Tokenizers.


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
    """The same, loaded from saved files, as a server does it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in installed.items():
        tokenizer.save_pretrained(folder / name)
    return {name: AutoTokenizer.from_pretrained(folder / name) for name in installed}
