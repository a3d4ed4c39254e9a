"""Starts or joins Ray for a run. Imports no heavy packages."""

import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from metaalign_rl.config.schema import Config
from metaalign_rl.core.errors import UserError

CONNECT_TIMEOUT = 10.0  # seconds


@contextmanager
def connect(config: Config) -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS, which Ray sets for submitted jobs; without it start Ray on this machine.

    A started Ray listens on the loopback only, requires a token, and stops at the end. A joined cluster keeps running.
    If Ray is connected already, that connection is used and stays open.

    Raises:
        UserError: RAY_ADDRESS is not the address of a cluster, or nothing answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _ignore_uv_run()
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        _require_token()
    import ray

    if ray.is_initialized():
        yield
        return
    if address:
        _join(address)
    else:
        _start(config)
    try:
        yield
    finally:
        ray.shutdown()


def _ignore_uv_run() -> None:
    """Under `uv run`, Ray would upload the working folder and start every worker by `uv run`.

    The workers run in the same environment without that. Ray reads the variable when it is imported.
    """
    if "RAY_ENABLE_UV_RUN_RUNTIME_ENV" not in os.environ:
        os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
        if "ray" in sys.modules:
            from ray._private import ray_constants

            ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False


def is_submitted() -> bool:
    """Whether this process is the driver of a job from `ray job submit`, which runs in an unpacked copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # Ray's job supervisor sets it for the driver


def is_connected() -> bool:
    """Whether this process is connected to Ray. Does not import Ray."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def _join(address: str) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS: expected host:port of a cluster's head node, or auto, found {address!r}; "
            "submit the run with `ray job submit --address`, or unset RAY_ADDRESS to run on this machine"
        )
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
        ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    except AuthenticationError as error:
        raise UserError(
            f"RAY_ADDRESS: the Ray cluster at {address!r} requires a token; set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN if the token is not in ~/.ray/auth_token"
        ) from error
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"RAY_ADDRESS: no Ray cluster answers at {address!r} ({reason}); start one with "
            "`ray start --head`, or unset RAY_ADDRESS to run on this machine"
        ) from error


def _require_token() -> None:
    """Make the Ray that starts here require a token, so that other users of the machine cannot connect.

    Ray reads the mode when it is imported. If it is imported already, `ray.init` itself turns the mode on. Without a
    token in the environment, it would write one to ~/.ray, for every Ray of this user.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


def _start(config: Config) -> None:
    import ray
    from ray._private import ray_constants

    # With 0, Ray treats this machine as one that cannot be in a cluster, and listens on the loopback only. Ray reads
    # the variable when it is imported, which may have happened already. Its processes read it when they start.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    libraries = Thread(target=_load_libraries)  # Ray takes 4 s to start and is idle for most of it
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
    """Import a library that all stages need, which takes 3 s."""
    from transformers import AutoTokenizer  # noqa: F401
