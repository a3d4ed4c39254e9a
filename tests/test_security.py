"""Access to a run: no other machine can connect, and on this machine only processes with its token."""

import ipaddress
import os
import socket
import subprocess
import sys

import psutil
from conftest import ROOT
from metric_pages import Seen, listeners

START = """
from metaalign_rl.runtime import ray_session
from metaalign_rl.config.schema import Config
with ray_session.connect(Config()):
    import ray
    print(ray.get_runtime_context().gcs_address, flush=True)
    input()
"""
ASK = "from ray._raylet import GcsClient; print(GcsClient(address={!r}).internal_kv_keys(b'', None))"


def test_a_run_listens_on_the_loopback_only(seen: Seen) -> None:
    names = {name for _, name in seen.listeners}
    assert {"ray::Learner", "ray::RolloutEn", "raylet", "gcs_server"} <= {name[:14] for name in names}
    assert not {(address, name) for address, name in seen.listeners if not is_loopback(address)}


def test_a_listener_on_another_address_is_detected() -> None:
    with socket.create_server(("0.0.0.0", 0)):
        assert any(not is_loopback(address) for address, _ in listeners([psutil.Process()]))


def test_a_runs_ray_rejects_processes_without_its_token() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    python, pipes = [sys.executable, "-c"], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*python, START], env=environment, cwd=ROOT, text=True, **pipes) as run:
        address = run.stdout.readline().strip()
        token = psutil.Process(run.pid).children()[0].environ()["RAY_AUTH_TOKEN"]
        answers = [
            subprocess.run([*python, ASK.format(address)], env=environment | variables, capture_output=True, text=True)
            for variables in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
        ]
        run.communicate("\n")
    stranger, owner = answers
    assert "InvalidAuthToken" in stranger.stderr and not stranger.stdout
    assert owner.returncode == 0, owner.stderr


def is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback
