"""Ray for a run: start or join it, and see that all is there before anything starts."""

import os
import secrets
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from metaalign_rl.config.schema import Config
from metaalign_rl.core.errors import UserError

PATIENCE = 10.0  # seconds in which the cluster at RAY_ADDRESS must answer


@contextmanager
def connect(config: Config) -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS (a submitted job has it set), else start one on the loopback, with a token.

    On leaving, the cluster that this started stops, and one that it joined goes on. Where Ray is connected
    already, the connection stays as it is.

    Raises:
        UserError: RAY_ADDRESS is not a cluster's, or nothing answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        _ask_for_token()
    import ray

    if ray.is_initialized():
        yield
        return
    warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
    if address:
        _join(address)
    else:
        _start(config)
    try:
        yield
    finally:
        ray.shutdown()


def is_submitted() -> bool:
    """Whether this process is the driver of a job from `ray job submit`, which works in an unpacked copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # Ray's job supervisor sets it for the driver


def is_connected() -> bool:
    """Whether this process is connected to Ray."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def _join(address: str) -> None:
    import ray

    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS: expected host:port of a cluster's head, or auto, found {address!r}; "
            "send the run there with `ray job submit --address`, or unset RAY_ADDRESS to run on this machine"
        )
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"RAY_ADDRESS: no Ray cluster answers at {address!r} ({reason}); start one with "
            "`ray start --head`, or unset RAY_ADDRESS to run on this machine"
        ) from error


def _ask_for_token() -> None:
    """Have the Ray that starts here turn away whoever lacks a token of this process's: other users of the machine.

    Ray reads it on import: where it was imported before, nothing changes.
    """
    if "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _start(config: Config) -> None:
    import ray
    from ray._private import ray_constants

    # Ray listens on every interface unless it takes this machine for one that cannot be in a cluster. It
    # reads the variable on import, which may have been before this; its processes read it when they start.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    libraries = Thread(target=_load_libraries)  # Ray takes 4 s to start, most of them waiting
    libraries.start()
    try:
        ray.init(
            address="local",
            num_cpus=config.cluster.cpus,
            include_dashboard=False,
            object_store_memory=config.cluster.object_store_bytes,
            log_to_driver=False,
            logging_level="WARNING",
        )
    finally:
        libraries.join()


def _load_libraries() -> None:
    """What every stage needs sooner or later; takes 3 s."""
    from transformers import AutoTokenizer  # noqa: F401
