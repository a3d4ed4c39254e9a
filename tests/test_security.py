"""Access to a run: no other machine can connect, and on this machine only processes with its token."""

import ipaddress
import socket

import psutil
from watched_run import Seen, listeners


def test_a_run_listens_on_the_loopback_only(seen: Seen) -> None:
    names = {name for _, name in seen.listeners}
    # The title of an actor's process may end with a method's name, and the system may cut it.
    found = {name.partition(".")[0][:14] for name in names}
    assert {"ray::Learner", "ray::RolloutEn", "raylet", "gcs_server"} <= found
    assert not {(address, name) for address, name in seen.listeners if not is_loopback(address)}


def test_a_listener_on_another_address_is_detected() -> None:
    with socket.create_server(("0.0.0.0", 0)):
        assert any(not is_loopback(address) for address, _ in listeners([psutil.Process()]))


def test_a_runs_ray_rejects_processes_without_its_token(seen: Seen) -> None:
    output, errors = seen.stranger
    assert "InvalidAuthToken" in errors and not output, seen.error
    output, errors = seen.owner
    assert output.startswith("["), errors


def is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback
