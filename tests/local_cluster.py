"""A Ray cluster on this machine whose nodes are raylets of their own, each on a loopback address of its own."""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx
import psutil
from conftest import ROOT, free_port

RAY = str(Path(sys.executable).with_name("ray"))


class Node:
    """One node: `ray start --block` and all that it started."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)

        def has_started() -> bool:
            assert self._process.poll() is None, log.read_text()
            return "Ray runtime started" in log.read_text()

        wait_until(has_started, log.read_text)

    def titles(self) -> set[str]:
        """What its processes are called; Ray gives its workers the names of their actors' classes."""
        lines = [" ".join(process.cmdline()) for process in self._family()]
        return {line.removeprefix("ray::").partition(".")[0].partition(" ")[0] for line in lines}

    def kill(self) -> None:
        """End it at once, as a machine that loses its power."""
        for process in self._family():
            process.kill()
        self._process.wait()

    def _family(self) -> list[psutil.Process]:
        if self._process.poll() is not None:
            return []
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]


class LocalCluster:
    """A head that takes no work, as KubeRay's, and any number of nodes. Use as a context manager.

    Who talks to it needs its token, which is in `environment`.
    """

    def __init__(self, folder: Path, nodes: int, cpus: int = 2) -> None:
        self._folder, self._cpus = folder, cpus
        self._temporary = Path(mkdtemp(prefix="ray-"))  # in pytest's folder the sockets' paths would be too long
        self.head_address = f"127.0.0.2:{free_port()}"
        self.jobs_address = f"http://127.0.0.2:{free_port()}"
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(),
            "RAY_API_SERVER_ADDRESS": self.jobs_address,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._count = 1
        host, _, port = self.head_address.rpartition(":")
        self.head = self._start(
            *("--head", f"--port={port}", "--num-cpus=0", f"--dashboard-host={host}"),
            f"--dashboard-port={self.jobs_address.rpartition(':')[2]}",
        )
        self.nodes = [self.add_node() for _ in range(nodes)]

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def add_node(self) -> Node:
        """One more node."""
        return self._start(f"--address={self.head_address}", f"--num-cpus={self._cpus}")

    def kill(self) -> None:
        """End every node at once."""
        for node in (*self.nodes, self.head):
            node.kill()
        shutil.rmtree(self._temporary)

    def ray(self, *words: str) -> str:
        """What a command of Ray's prints."""
        done = subprocess.run([RAY, *words], env=self.environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, job: str, *entrypoint: str) -> None:
        """`ray job submit` as docs/jobs.md has it, without waiting for the end."""
        # Ray's job agent takes seconds longer to start than the head.
        words = ("job", "submit", "--no-wait", f"--submission-id={job}", "--runtime-env=jobs/runtime_env.yaml")
        end = time.monotonic() + 60
        while True:
            try:
                self.ray(*words, "--working-dir=.", "--", *entrypoint)
                return
            except AssertionError as error:
                if "No available agent" not in str(error) or time.monotonic() > end:
                    raise

    def status(self, job: str) -> str:
        """What has become of a job: PENDING, RUNNING, SUCCEEDED, STOPPED, FAILED."""
        found: str = self._ask(f"/api/jobs/{job}")["status"]
        return found

    def logs(self, job: str) -> str:
        """What `ray job logs` prints."""
        found: str = self._ask(f"/api/jobs/{job}/logs")["logs"]
        return found

    def _ask(self, path: str) -> Any:
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        return httpx.get(self.jobs_address + path, headers=token).raise_for_status().json()

    def _start(self, *words: str) -> Node:
        self._count += 1
        command = [
            *(RAY, "start", "--block", f"--node-ip-address=127.0.0.{self._count}", f"--object-store-memory={2**27}"),
            *(
                f"--dashboard-agent-listen-port={free_port()}",
                f"--temp-dir={self._temporary / str(self._count)}",
                *words,
            ),
        ]
        return Node(command, self.environment, self._folder / f"node-{self._count}.log")


def wait_until(condition: Callable[[], bool], told: Callable[[], str], seconds: float = 180) -> None:
    """Wait for a condition; on giving up say what is `told`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, told()
        time.sleep(0.1)
