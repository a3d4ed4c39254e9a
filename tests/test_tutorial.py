"""The tutorial's commands for a CPU, run in the order of the page in one folder.

Three things differ from what a reader does:
- `configs/quickstart.yaml` has tiny sizes, and the quickstart has run already.
- Ray has its own ports and folder.
- Ray stays in the foreground, so that the test can kill it. `ray stop` would stop every Ray on the machine.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, free_port, python_path
from docs_blocks import DOCS, blocks
from processes import family

from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.core.files import read_jsonl

pytestmark = pytest.mark.slow

BLOCKS = [block.text for block in blocks(DOCS / "tutorial.md", "bash") if block.mark == "run"]
PORTS = ("6379", "8265")
STARTING = ("No available agent", "Failed to connect to Ray")  # Ray's messages while a cluster starts


def test_the_commands_of_the_tutorial_succeed(tiny_run: Path, tmp_path: Path) -> None:
    prepare(tmp_path, tiny_run)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short name: it is part of the paths of sockets
        (start,) = (block for block in BLOCKS if "ray start" in block)
        at = BLOCKS.index(start)
        for block in BLOCKS[:at]:
            shell(block, tmp_path)
        assert [score["probabilities"].keys() for _, score in read_jsonl(tmp_path / "scores.jsonl")]
        assert (tmp_path / "runs" / "mine" / "policy" / "model.safetensors").is_file()
        ports = {port: str(free_port()) for port in PORTS}
        with background(f"{replaced(start, ports).rstrip()} {own_place(folder)}", tmp_path):
            printed = [shell(replaced(block, ports), tmp_path) for block in BLOCKS[at + 1 :]]
    assert "succeeded" in printed[-1] and "ppo: " in printed[-1], printed[-1]
    assert (tmp_path / "runs" / "mine-on-ray" / "policy" / "model.safetensors").is_file()


def prepare(folder: Path, tiny_run: Path) -> None:
    """Make the folder that a reader has after `make quickstart`, with tiny sizes."""
    for name in ("jobs", "metaalign_rl", "reward"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_run, folder / "runs" / "quickstart")
    (folder / "configs").mkdir()
    tiny = loader.load(Config, ROOT / "configs" / "quickstart.yaml", TINY)
    (folder / "configs" / "quickstart.yaml").write_text(loader.dump(tiny))


def own_place(folder: str) -> str:
    """Options of `ray start` that separate it from other clusters on this machine."""
    ports = (f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "ray-client-server-port"))
    return " ".join(["--block", f"--temp-dir={folder}", *ports])


def replaced(text: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        text = text.replace(old, new)
    return text


def environment(home: Path) -> dict[str, str]:
    """The environment after `source .venv/bin/activate`, with another home folder: Ray's token is in it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    fresh = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**fresh, "HOME": str(home), "PATH": path, "PYTHONPATH": python_path(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}


def shell(block: str, folder: Path) -> str:
    """Run a block, which must succeed; its output. Retries while Ray's job agent and dashboard still start."""
    end = time.monotonic() + 120
    while True:
        command = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
        if not any(text in done.stdout + done.stderr for text in STARTING) or time.monotonic() > end:
            assert done.returncode == 0, block + done.stdout + done.stderr
            return done.stdout
        time.sleep(1)


@contextmanager
def background(block: str, folder: Path) -> Iterator[None]:
    """Run a block that starts Ray. On leaving, kill its process and all descendants."""
    log = folder / "ray.log"
    with log.open("wb") as out:
        process = subprocess.Popen(["bash", "-c", block], cwd=folder, env=environment(folder), stdout=out, stderr=out)
    try:
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        for one in family(process.pid):
            with suppress(psutil.NoSuchProcess):  # a worker ends with the process that it runs for
                one.kill()
        process.wait()
