"""Who can reach a run that goes on: nobody from another machine, and on this one nobody without its token."""

import ipaddress
import os
import socket
import subprocess
import sys

import psutil
import pytest
from conftest import ROOT
from metric_pages import Seen, listeners

JOIN = "import ray; ray.init(address={!r}, log_to_driver=False); print('joined')"
START = """
from metaalign_rl import runtime
from metaalign_rl.config import Config
with runtime.connect(Config()):
    import ray
    print(ray.get_runtime_context().gcs_address, flush=True)
    input()
"""


def test_a_run_listens_on_the_loopback_alone(seen: Seen) -> None:
    names = {name for _, name in seen.listeners}
    assert {"ray::Learner", "ray::RolloutEn", "raylet", "gcs_server"} <= {name[:14] for name in names}
    assert not {(address, name) for address, name in seen.listeners if not is_loopback(address)}


def test_a_listener_on_another_address_would_be_seen() -> None:
    with socket.create_server(("0.0.0.0", 0)):
        assert any(not is_loopback(address) for address, _ in listeners([psutil.Process()]))


@pytest.mark.slow
def test_a_runs_ray_turns_away_who_lacks_its_token() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # as in a run; else 127.0.0.1 is not taken so
    python, pipes = [sys.executable, "-c"], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*python, START], env=environment, cwd=ROOT, text=True, **pipes) as run:
        address = run.stdout.readline().strip()
        stranger = [*python, JOIN.format(address)]
        done = subprocess.run(stranger, env=environment, capture_output=True, text=True, timeout=60)
        run.communicate("\n")
    assert "joined" not in done.stdout
    assert "InvalidAuthToken" in done.stderr


def is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback
