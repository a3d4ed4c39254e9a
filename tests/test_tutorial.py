"""The tutorial's commands for a CPU, taken from the page and run in its order in one folder.

They run as they are shown. Three things are other than for a reader: `configs/quickstart.yaml` asks for little, the
quickstart is there already, and Ray has ports and a folder of its own and stays in the foreground, so that the test can
end it without `ray stop`, which would end every Ray on the machine.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, free_port
from docs_blocks import DOCS, blocks

from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.core.files import read_jsonl

pytestmark = pytest.mark.slow

BLOCKS = [block.text for block in blocks(DOCS / "tutorial.md", "bash") if block.mark == "run"]
PORTS = ("6379", "8265")
STARTING = ("No available agent", "Failed to connect to Ray")  # what Ray says of a cluster that is not all there yet


def test_the_tutorial_goes_through(tiny_run: Path, tmp_path: Path) -> None:
    prepare(tmp_path, tiny_run)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short name: sockets lie in it
        (start,) = (block for block in BLOCKS if "ray start" in block)
        at = BLOCKS.index(start)
        for block in BLOCKS[:at]:
            shell(block, tmp_path)
        assert [score["probabilities"].keys() for _, score in read_jsonl(tmp_path / "scores.jsonl")]
        assert (tmp_path / "runs" / "mine" / "policy" / "model.safetensors").is_file()
        ports = {port: str(free_port()) for port in PORTS}
        with background(f"{replaced(start, ports).rstrip()} {own_place(folder)}", tmp_path):
            told = [shell(replaced(block, ports), tmp_path) for block in BLOCKS[at + 1 :]]
    assert "succeeded" in told[-1] and "ppo: " in told[-1], told[-1]
    assert (tmp_path / "runs" / "mine-on-ray" / "policy" / "model.safetensors").is_file()


def prepare(folder: Path, tiny_run: Path) -> None:
    """What a reader has after `make quickstart`, at a tiny size."""
    for name in ("jobs", "metaalign_rl", "reward"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_run, folder / "runs" / "quickstart")
    (folder / "configs").mkdir()
    tiny = loader.load(Config, ROOT / "configs" / "quickstart.yaml", TINY)
    (folder / "configs" / "quickstart.yaml").write_text(loader.dump(tiny))


def own_place(folder: str) -> str:
    """Options of `ray start` that keep it off what other clusters on this machine have."""
    ports = (f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "ray-client-server-port"))
    return " ".join(["--block", f"--temp-dir={folder}", *ports])


def replaced(text: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        text = text.replace(old, new)
    return text


def environment() -> dict[str, str]:
    """As after `source .venv/bin/activate`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    fresh = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**fresh, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}


def shell(block: str, folder: Path) -> str:
    """What a block prints; it must end well. Ray's job agent and its dashboard take longer to start than the head."""
    end = time.monotonic() + 120
    while True:
        command = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
        if not any(text in done.stdout + done.stderr for text in STARTING) or time.monotonic() > end:
            assert done.returncode == 0, block + done.stdout + done.stderr
            return done.stdout
        time.sleep(1)


@contextmanager
def background(block: str, folder: Path) -> Iterator[None]:
    """A block that starts Ray and does not end; at the end it and all that it started are killed, by their numbers."""
    log = folder / "ray.log"
    with log.open("wb") as out:
        process = subprocess.Popen(["bash", "-c", block], cwd=folder, env=environment(), stdout=out, stderr=out)
    try:
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        root = psutil.Process(process.pid)
        for one in [root, *root.children(recursive=True)]:
            one.kill()
        process.wait()
