"""What comes from the environment of a run: paths with ~, proxies, `uv run`, and what `ray job submit` uploads."""

import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from metaalign_rl.cli import main
from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import TIERS
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.net import proxy_for, via
from metaalign_rl.preflight.checks import check_sources
from reward import cli as reward_cli
from reward.serving.client import RemoteScorer, ScorerUnavailable

ROOT = Path(__file__).resolve().parents[1]


# Paths


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and another folder to work in."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize("key", ["run.root", "data.path", "model.path", "reward.path"])
def test_a_tilde_in_a_path_setting_is_the_home_folder(home: Path, tmp_path: Path, key: str) -> None:
    section, _, name = key.partition(".")
    (tmp_path / "config.yaml").write_text(f"{section}: {{{name}: ~/x}}\n")
    for config in (loader.load(Config, None, [f"{key}=~/x"]), loader.load(Config, tmp_path / "config.yaml", [])):
        assert getattr(getattr(config, section), name) == f"{home}/x"
    assert f"{home}/x" in loader.dump(config)


def test_a_tilde_in_the_path_of_a_function_is_the_home_folder(home: Path) -> None:
    config = loader.load(Config, None, ["reward.function=~/mine.py:polite", "ppo.function_weight=1"])
    assert config.reward.function == f"{home}/mine.py:polite"


@pytest.mark.parametrize("value", ["$HOME/runs", "${HOME}/runs", "/shared/$USER", "~nobody-has-this-name/x"])
def test_what_only_a_shell_expands_is_refused_and_no_folder_gets_such_a_name(home: Path, value: str) -> None:
    with pytest.raises(UserError, match="run.root: expected a path.*; write the folder's name out"):
        loader.load(Config, None, [f"run.root={value}"])


def test_every_path_option_of_the_commands_expands_a_tilde(home: Path) -> None:
    """The parsers are walked: an option whose help or name speaks of a file or folder has a type that expands."""
    parsers = [main._parser(), reward_cli._parser()]
    found = {}
    while parsers:
        parser = parsers.pop()
        for action in parser._actions:
            if isinstance(action.choices, dict):
                parsers += action.choices.values()
            is_path = action.metavar in ("DIR", "FILE", "RUN_DIR", "CONFIG", "MODEL", "NAME=DIR", "SIZE")
            names = {"input", "output", "data", "eval_data", "model", "base", "run", "policy", "file", "files"}
            if is_path or (action.dest in names and parser.prog.startswith("metaalign-reward")):
                assert action.type is not None, (parser.prog, action.dest)
                given = action.type("name=~/x" if action.metavar == "NAME=DIR" else "~/x")
                found[parser.prog, action.dest] = str(given[1] if isinstance(given, tuple) else given)
    assert len(found) > 20
    assert set(found.values()) == {f"{home}/x"}


def test_a_command_writes_to_the_home_folder(home: Path) -> None:
    sizes = ("demonstrations", "pairs", "prompts", "held_out_prompts", "held_out_pairs", "paraphrased_wishes")
    words = [f"data.{name}=1" for name in sizes]
    assert main.main(["data", "build", str(ROOT / "configs/quickstart.yaml"), *words, "--output=~/rows"]) == 0
    assert (home / "rows" / "pairs.jsonl").is_file()
    assert not list(Path().iterdir())


# Proxies


class Ready(BaseHTTPRequestHandler):
    """A scorer that is ready and gives each row the logit 1."""

    def do_GET(self) -> None:
        self._reply({})

    def do_POST(self) -> None:
        rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["rows"]
        self._reply({"scores": [{"overall": 1.0, "tiers": dict.fromkeys(TIERS, 1.0)} for _ in rows]})

    def _reply(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def scorer() -> Iterator[str]:
    """The URL of a server on this machine."""
    server = HTTPServer(("127.0.0.1", 0), Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A proxy for everything, at which nothing listens."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    return monkeypatch


@pytest.mark.parametrize(
    ("url", "no_proxy", "is_direct"),
    [
        ("http://127.0.0.1:8300", "", True),
        ("http://localhost:8300", "", True),
        ("http://[::1]:8300", "", True),
        ("http://10.1.2.3:8300", "", True),
        ("https://192.168.0.7", "", True),
        ("http://[fd00::7]:8300", "", True),
        ("http://8.8.8.8:8300", "", False),
        ("http://8.8.8.8:8300", "1.1.1.1, 8.8.0.0/16", True),
        ("http://8.9.8.8:8300", "8.8.0.0/16", False),
        ("http://[2001:4860::1]:8300", "2001:4860::/32", True),
        ("http://scorer.example.com:8300", "", False),
        ("https://scorer.example.com:8300", ".example.com", True),
        ("http://scorer.example.com:8300", "10.0.0.0/8,scorer.example.com", True),
    ],
)
def test_private_addresses_and_ranges_of_no_proxy_need_no_proxy(
    proxies: pytest.MonkeyPatch, url: str, no_proxy: str, is_direct: bool
) -> None:
    proxies.setenv("no_proxy", no_proxy)
    assert (proxy_for(url) is None) == is_direct


@pytest.mark.parametrize("no_proxy", ["", "127.0.0.0/8", "::1/128,10.0.0.0/8"])
def test_a_server_on_this_machine_is_asked_without_the_proxy(
    proxies: pytest.MonkeyPatch, scorer: str, no_proxy: str
) -> None:
    proxies.setenv("no_proxy", no_proxy)
    (check,) = check_sources(Config(reward=loader.load(Config, None, [f"reward.url={scorer}"]).reward))
    assert check.ok, check.found
    row = {"messages": [{"role": "user", "content": "hi"}], "response": "x"}
    assert RemoteScorer(scorer, retries=0).score([row])[0].overall == 1.0


def test_an_error_behind_a_proxy_names_the_proxy_without_its_password(proxies: pytest.MonkeyPatch) -> None:
    url = "http://scorer.example.com:8300"
    (check,) = check_sources(Config(reward=loader.load(Config, None, [f"reward.url={url}"]).reward))
    assert not check.ok
    assert "through the proxy 127.0.0.1:9 of the environment" in check.remedy
    assert "secret" not in check.remedy
    row = {"messages": [{"role": "user", "content": "hi"}], "response": "x"}
    with pytest.raises(ScorerUnavailable, match=r"through the proxy 127.0.0.1:9 .* add its name to no_proxy") as error:
        RemoteScorer(url, retries=0).score([row])
    assert "secret" not in str(error.value)
    assert via(None) == ""


# uv run


def test_workers_are_not_started_by_uv_run() -> None:
    code = (
        "import os, sys\nfrom metaalign_rl.runtime import ray_session\nray_session._ignore_uv_run()\n"
        "from ray._private import ray_constants\nprint(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)\n"
        "del os.environ['RAY_ENABLE_UV_RUN_RUNTIME_ENV']\nray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = True\n"
        "ray_session._ignore_uv_run()\nprint(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)\n"
    )
    for given, expected in ((None, ["False", "False"]), ("1", ["True", "False"])):
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
        environment |= {} if given is None else {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": given}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.stdout.split() == expected, done.stderr


# What is uploaded

OTHERS = (
    "rows/pairs.csv", "rows/pairs.json", "rows/pairs.jsonl", "rows/pairs.jsonl.gz", "rows/data-00000.arrow", "rows.zip",
    "models/base/model.pth", "models/base/model.gguf", "models/base/model.safetensors", "outputs/state.ckpt",
    "env/lib/python3.11/site-packages/x.py", ".venv311/lib/x.py", ".conda/lib/x.py", "hf_cache/datasets/x.arrow",
    ".env", ".env.local", ".envrc", "core.1234", "notes.txt", "mine.py", "wandb/run/x.yaml",
    "metaalign_rl/weights/model.safetensors", "configs/rows.jsonl", "jobs/secret.env", "reward/__pycache__/x.pyc",
)  # fmt: skip


def test_only_code_and_configs_are_uploaded(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import _zip_files

    code, others = ("metaalign_rl", "reward", "configs", "jobs"), ("docs", "tests", "benchmarks")
    files = [path.relative_to(ROOT) for folder in (*code, *others) for path in (ROOT / folder).rglob("*.*")]
    names = [str(path) for path in files if "__pycache__" not in path.parts and (ROOT / path).is_file()]
    for name in (*names, *OTHERS):
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkout" / name).write_text("x")
    excludes = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())["excludes"]
    _zip_files(str(tmp_path / "checkout"), excludes, str(tmp_path / "upload.zip"), include_gitignore=True)
    found = {name for name in zipfile.ZipFile(tmp_path / "upload.zip").namelist() if not name.endswith("/")}
    assert found == {name for name in names if name.partition("/")[0] in code}
