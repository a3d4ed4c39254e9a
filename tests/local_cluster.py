"""A Ray cluster on this machine. Each node has its own raylet, loopback address and folder."""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx
import psutil
from conftest import ROOT, free_port
from processes import family

RAY = str(Path(sys.executable).with_name("ray"))
# Notice a dead node within 3 s. Ray's default is 15 s: 5 failed checks, one every 3 s.
HEALTH_CHECKS = {"RAY_health_check_period_ms": "500", "RAY_health_check_initial_delay_ms": "500"}


class Node:
    """One node: the process of `ray start --block` and its descendants."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)

    def wait_until_started(self) -> None:
        """Wait until Ray says that the node runs."""

        def has_started() -> bool:
            assert self._process.poll() is None, self._log.read_text()
            return "Ray runtime started" in self._log.read_text()

        wait_until(has_started, self._log.read_text)

    def titles(self) -> set[str]:
        """The titles of its processes. Ray gives an actor's process the name of the actor's class."""
        lines = [" ".join(process.cmdline()) for process in self._family()]
        return {line.removeprefix("ray::").partition(".")[0].partition(" ")[0] for line in lines}

    def kill(self) -> None:
        """Kill all its processes, as when a machine loses power."""
        for process in self._family():
            with suppress(psutil.NoSuchProcess):  # a worker ends with the process that it runs for
                process.kill()
        self._process.wait()

    def _family(self) -> list[psutil.Process]:
        return [] if self._process.poll() is not None else family(self._process.pid)


class LocalCluster:
    """A head and any number of nodes that require a token, which is in `environment`. Use as a context manager.

    Args:
        folder: for the logs.
        nodes: how many nodes join the head.
        cpus: CPUs of each node.
        head_cpus: CPUs of the head; the manifests give it none.
        variables: more environment variables of all nodes.
    """

    def __init__(
        self, folder: Path, nodes: int, cpus: int = 2, head_cpus: int = 0, variables: Mapping[str, str] | None = None
    ) -> None:
        self._folder, self._cpus, self._head_cpus, self._node_count = folder, cpus, head_cpus, nodes
        self._temporary = Path(mkdtemp(prefix="ray-"))  # in pytest's folder the paths of sockets would be too long
        # Clusters that run at the same time have different addresses, since their workers use the same ports.
        self._network = f"127.{1 + secrets.randbelow(254)}.{secrets.randbelow(255)}"
        self._host, self._port = f"{self._network}.1", free_port()
        self.jobs_address = f"http://{self._host}:{free_port()}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            **HEALTH_CHECKS,
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
            ports = [f"--port={self._port}", f"--ray-client-server-port={free_port()}"]
            self._start("--head", *ports, f"--num-cpus={self._head_cpus}", *dashboard)
            self.nodes = [self.add_node() for _ in range(self._node_count)]
            # Ray's job agent starts seconds after the head. KubeRay's probe is the same request, without the token.
            wait_until(lambda: is_well(f"http://{self._host}:{self._agent_port}/api/healthz"), lambda: "no job agent")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def add_node(self) -> Node:
        """Start one more node."""
        return self._start(f"--address={self._host}:{self._port}", f"--num-cpus={self._cpus}")

    def kill(self) -> None:
        """Kill every node."""
        for node in self._started:
            node.kill()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def run(self, *command: str) -> str:
        """Run a command, which must succeed, and return its output."""
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, job: str, *entrypoint: str) -> None:
        """`ray job submit` as docs/jobs.md shows it. Does not wait for the job's end."""
        sent = ("--runtime-env", "jobs/runtime_env.yaml", "--working-dir", ".")
        self.run("ray", "job", "submit", "--no-wait", "--submission-id", job, *sent, "--", *entrypoint)

    def status(self, job: str) -> str:
        """The status of a job: PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
        found: str = self.ask(f"/api/jobs/{job}")["status"]
        return found

    def wait_for_job(self, job: str, status: str) -> None:
        """Wait until a job has ended, with this status."""
        wait_until(lambda: self.status(job) not in ("PENDING", "RUNNING"), lambda: self.logs(job), poll=0.5)
        assert self.status(job) == status, self.logs(job)

    def logs(self, job: str) -> str:
        """The output of `ray job logs`."""
        found: str = self.ask(f"/api/jobs/{job}/logs")["logs"]
        return found

    def ask(self, path: str) -> Any:
        """Ray's answer to a request with the token."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        return httpx.get(self.jobs_address + path, headers=token).raise_for_status().json()

    def _start(self, *words: str) -> Node:
        """Start a node. Only one starts at a time: two that start together disturb each other."""
        number, agent_port = len(self._started) + 1, free_port()
        if number == 1:
            self._agent_port = agent_port
        own = {
            "node-ip-address": f"{self._network}.{number}",
            "temp-dir": self._temporary / str(number),
            "dashboard-agent-listen-port": agent_port,
            "object-store-memory": 2**27,
        }
        command = [RAY, "start", "--block", *(f"--{key}={value}" for key, value in own.items()), *words]
        node = Node(command, self.environment, self._folder / f"{self._network}.{number}.log")
        self._started.append(node)
        node.wait_until_started()
        return node


def is_well(url: str) -> bool:
    """Whether the server at `url` answers with status 200."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def wait_until(
    condition: Callable[[], bool], message: Callable[[], str], seconds: float = 180, poll: float = 0.1
) -> None:
    """Wait for a condition; after `seconds` fail with `message`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, message()
        time.sleep(poll)
