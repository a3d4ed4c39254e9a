"""Hostile clients of a real scoring server: it stays small, and answers others within a second."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from typing import Any

import httpx
import psutil
import pytest
from conftest import ROOT, free_port
from reward_toys import reward_model

TOKEN = {"Authorization": "Bearer secret"}
MIB = 2**20
MESSAGE = {"role": "user", "content": "what color is it"}
ROW = {"system_info": "say red", "messages": [MESSAGE], "response": "red"}
SERVE = "import sys; from reward.cli import main; sys.exit(main())"


class Server:
    """A real `metaalign-reward serve`, and what it is like for an honest client while others do their worst."""

    def __init__(self, process: "subprocess.Popen[str]", port: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._process = psutil.Process(process.pid)
        self.limit = 10.0  # seconds; on a calm machine the slowest reply takes less than one

    def memory(self) -> int:
        return int(self._process.memory_info().rss)

    def while_running(self, attack: Callable[[], Any], headers: dict[str, str]) -> tuple[float, float, Any]:
        """Run the attack in another process, so that it does not slow down the honest client.

        Returns:
            The slowest reply to an honest client in seconds, the most memory that the server gained in MiB, and the
            attack's result.
        """
        ended, slowest, most, idle = threading.Event(), 0.0, 0, self.memory()

        def watch() -> None:
            nonlocal most
            while not ended.wait(0.01):
                most = max(most, self.memory() - idle)

        def use(path: str, body: Any) -> None:
            nonlocal slowest
            with httpx.Client(base_url=self.url, headers=headers, timeout=30) as client:
                while True:
                    began = time.monotonic()
                    reply = client.post(path, json=body) if body else client.get(path)
                    slowest = max(slowest, time.monotonic() - began)
                    assert reply.status_code == 200, reply.text
                    if ended.wait(0.05):
                        return

        # The process is forked before the threads start: it would inherit the locks that they hold, and wait forever.
        with get_context("fork").Pool(1, _remember, (attack,)) as attacker, ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(watch), pool.submit(use, "/health", None), pool.submit(use, "/score", {"rows": ROW})]
            try:
                result = attacker.apply(_attack)
            finally:
                ended.set()
            for job in jobs:
                job.result()
        return slowest, most / MIB, result


def _remember(attack: Callable[[], Any]) -> None:
    """Keep a forked process's attack: a closure cannot be sent to it."""
    global _attack_here
    _attack_here = attack


def _attack() -> Any:
    return _attack_here()


@pytest.fixture(scope="module", params=["secret", ""], ids=["token", "no token"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    port = free_port()
    words = ["serve", "--model", str(reward_model()), "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    env = os.environ | {"METAALIGN_REWARD_TOKEN": request.param}
    command = [sys.executable, "-c", SERVE, *words]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert f":{port}" in process.stdout.readline()
        found = Server(process, port)
        for _ in range(20):  # idle is after the first requests
            httpx.post(f"{found.url}/score", json={"rows": [ROW] * 50}, headers=TOKEN).raise_for_status()
        yield found
        process.kill()


def upload(port: int, size: int, headers: str = "") -> bytes:
    """Send a body of `size` bytes without a token, as fast as the server takes it; returns the reply."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        head = f"POST /score HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {size}\r\n\r\n"
        connection.sendall(head.encode())
        with suppress(OSError):  # the server may close the connection
            connection.sendall(b"x" * size)
        with suppress(OSError):
            return connection.recv(2000)
    return b""


def wide(size: int) -> bytes:
    """A row with one character that makes Python store all others in four bytes."""
    return json.dumps({"rows": {**ROW, "response": "x" * size + "\U0001f600"}}, ensure_ascii=False).encode()


def post(server: Server, body: Any) -> tuple[int, str]:
    """Send a body; returns the status and the beginning of the reply."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {**TOKEN, "Content-Type": "application/json"}
    reply = httpx.post(f"{server.url}/score", content=content, headers=headers, timeout=60)
    return reply.status_code, reply.text[:300]


def test_bodies_without_a_token_cost_no_memory_and_no_time(server: Server) -> None:
    def attack() -> list[bytes]:
        with ThreadPoolExecutor(30) as pool:
            return list(pool.map(lambda _: upload(server.port, 14 * MIB), range(60)))

    slowest, gained, replies = server.while_running(attack, TOKEN)
    assert all(reply.split(b" ")[1] in (b"401", b"413") for reply in replies if reply)
    assert (slowest < server.limit, gained < 100) == (True, True), (slowest, gained)


@pytest.mark.parametrize(
    ("name", "status"),
    [("messages", 413), ("one character", 413), ("wide characters", 413), ("lists", 413), ("full rows", (200, 429)),
     ("long dialogs", (200, 429))],
)  # fmt: skip
def test_the_cost_of_a_request_is_bounded(server: Server, name: str, status: Any) -> None:
    bodies = {
        "messages": lambda: {"rows": {**ROW, "messages": [MESSAGE] * 150_001}},
        "one character": lambda: {"rows": {**ROW, "response": "<" * 1_000_000}},
        "wide characters": lambda: wide(3 * MIB),
        "lists": lambda: b'{"rows": [' + b"[]," * MIB + b"[]]}",
        "full rows": lambda: {"rows": [{**ROW, "system_info": "say red " * 12}] * 1024},
        "long dialogs": lambda: {"rows": [{**ROW, "messages": [{**MESSAGE, "content": "blue " * 19_000}]}] * 40},
    }
    body = bodies[name]()
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    slowest, gained, (found, text) = server.while_running(lambda: post(server, body), TOKEN)
    assert found in (status if isinstance(status, tuple) else (status,)), text
    assert (slowest < server.limit, gained < 100) == (True, True), (slowest, gained)


def test_a_few_hostile_requests_at_a_time_do_not_add_up(server: Server) -> None:
    bodies = [
        json.dumps({"rows": [{**ROW, "tags": {str(n): str(n) for n in range(20_000)}}]}).encode(),
        json.dumps({"rows": {**ROW, "messages": [MESSAGE] * 20_000}}).encode(),
        wide(3 * MIB),
    ]

    def attack() -> None:
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(lambda number: post(server, bodies[number % 3]), range(40)))

    slowest, gained, _ = server.while_running(attack, TOKEN)
    assert (slowest < server.limit, gained < 100) == (True, True), (slowest, gained)


def test_slow_bodies_do_not_block_the_server(server: Server) -> None:
    """Slow loris: connections that send one byte and wait."""

    def attack() -> None:
        connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
        for connection in connections:
            connection.sendall(
                b"POST /score HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
                b"Content-Length: 100000\r\n\r\nx"
            )
        time.sleep(0.5)
        for connection in connections:
            connection.close()

    slowest, gained, _ = server.while_running(attack, TOKEN)
    assert (slowest < server.limit, gained < 100) == (True, True), (slowest, gained)


def test_headers_without_an_end_cost_no_memory(server: Server) -> None:
    def attack() -> None:
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", server.port)) as connection, suppress(OSError):
                connection.sendall(b"GET / HTTP/1.1\r\nX: ")
                for _ in range(8):
                    connection.sendall(b"x" * MIB)

    slowest, gained, _ = server.while_running(attack, TOKEN)
    assert (slowest < server.limit, gained < 50) == (True, True), (slowest, gained)


def test_a_page_of_another_site_gets_nothing_from_a_server_without_a_token(server: Server) -> None:
    rebound = httpx.post(f"{server.url}/score", json={"rows": ROW}, headers={"Host": f"evil.example:{server.port}"})
    assert rebound.status_code in (401, 403)
    crossed = httpx.post(f"{server.url}/score", json={"rows": ROW}, headers={"Origin": "https://evil.example"})
    assert crossed.status_code in (401, 403)
