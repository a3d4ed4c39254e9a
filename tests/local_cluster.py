"""A Ray cluster on this machine whose nodes are raylets of their own, each on a loopback address of its own."""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
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
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)

    def wait_until_started(self) -> None:
        def has_started() -> bool:
            assert self._process.poll() is None, self._log.read_text()
            return "Ray runtime started" in self._log.read_text()

        wait_until(has_started, self._log.read_text)

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
    """A head and any number of nodes behind a token, which is in `environment`. Use as a context manager.

    Args:
        folder: of the logs.
        head_cpus: none, as KubeRay's heads have by our manifests.
        variables: more for the environment of all nodes.
    """

    def __init__(
        self, folder: Path, nodes: int, cpus: int = 2, head_cpus: int = 0, variables: Mapping[str, str] | None = None
    ) -> None:
        self._folder, self._cpus, self._head_cpus, self._wanted = folder, cpus, head_cpus, nodes
        self._temporary = Path(mkdtemp(prefix="ray-"))  # in pytest's folder the sockets' paths would be too long
        self._host, self._port = "127.0.0.2", free_port()
        self.jobs_address = f"http://{self._host}:{free_port()}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            **(variables or {}),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(),
            "RAY_API_SERVER_ADDRESS": self.jobs_address,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._started: list[Node] = []

    def __enter__(self) -> "LocalCluster":
        try:
            dashboard = [f"--dashboard-host={self._host}", f"--dashboard-port={self.jobs_address.rpartition(':')[2]}"]
            self._start("--head", f"--port={self._port}", f"--num-cpus={self._head_cpus}", *dashboard)
            self.nodes = [self.add_node() for _ in range(self._wanted)]
            # Ray's job agent takes seconds longer to start than the head. KubeRay's probes ask so, without the token.
            wait_until(lambda: is_well(f"http://{self._host}:{self._agent_port}/api/healthz"), lambda: "no job agent")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def add_node(self) -> Node:
        """One more node."""
        return self._start(f"--address={self._host}:{self._port}", f"--num-cpus={self._cpus}")

    def kill(self) -> None:
        """End every node at once."""
        for node in self._started:
            node.kill()
        shutil.rmtree(self._temporary)

    def run(self, *command: str) -> str:
        """What a command prints; it must end well."""
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, job: str, *entrypoint: str) -> None:
        """`ray job submit` as docs/jobs.md has it, without waiting for the end."""
        sent = ("--runtime-env", "jobs/runtime_env.yaml", "--working-dir", ".")
        self.run("ray", "job", "submit", "--no-wait", "--submission-id", job, *sent, "--", *entrypoint)

    def status(self, job: str) -> str:
        """What has become of a job: PENDING, RUNNING, SUCCEEDED, STOPPED, FAILED."""
        found: str = self.ask(f"/api/jobs/{job}")["status"]
        return found

    def logs(self, job: str) -> str:
        """What `ray job logs` prints."""
        found: str = self.ask(f"/api/jobs/{job}/logs")["logs"]
        return found

    def ask(self, path: str) -> Any:
        """What Ray's dashboard answers who has the token."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        return httpx.get(self.jobs_address + path, headers=token).raise_for_status().json()

    def _start(self, *words: str) -> Node:
        """A node whose address ends in its number. One after the other: two at the same moment disturb each other."""
        number, agent_port = len(self._started) + 2, free_port()
        if number == 2:
            self._agent_port = agent_port
        own = {
            "node-ip-address": f"127.0.0.{number}",
            "temp-dir": self._temporary / str(number),
            "dashboard-agent-listen-port": agent_port,
            "object-store-memory": 2**27,
        }
        command = [RAY, "start", "--block", *(f"--{key}={value}" for key, value in own.items()), *words]
        node = Node(command, self.environment, self._folder / f"node-{number}.log")
        self._started.append(node)
        node.wait_until_started()
        return node


def is_well(url: str) -> bool:
    """Whether a server answers there, and well."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def wait_until(condition: Callable[[], bool], told: Callable[[], str], seconds: float = 180) -> None:
    """Wait for a condition; on giving up say what is `told`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, told()
        time.sleep(0.1)
