"""Ray for a run: start or join it, and see that all is there before anything starts."""

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metaalign_rl import needs
from metaalign_rl.config import Config
from metaalign_rl.errors import UserError
from metaalign_rl.needs import GIB, Check
from metaalign_rl.placement import Role, placement, shares

OBJECT_STORE_SHARE = 0.1  # of cluster.memory_gib; experience passes through it, and weights: two buckets must fit
LEAST_OBJECT_STORE = 128 * 2**20  # bytes; Ray refuses less than 75 MiB
PATIENCE = 10.0  # seconds in which the cluster at RAY_ADDRESS must answer


@contextmanager
def connect(config: Config) -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS (a submitted job has it set), else start one on the loopback.

    On leaving, the cluster that this started stops, and one that it joined goes on. Where Ray is connected
    already, the connection stays as it is.

    Raises:
        UserError: RAY_ADDRESS is not a cluster's, or nothing answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
    if address := os.environ.get("RAY_ADDRESS"):
        _join(address)
    else:
        _start(config)
    try:
        yield
    finally:
        ray.shutdown()


def actor_env(threads: int) -> dict[str, str]:
    """Environment variables for an actor's `runtime_env` that keep it to `threads` threads."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def preflight(config: Config) -> list[Check]:
    """What the config needs beside what this machine has, and once Ray is connected, what its cluster has."""
    checks = [*needs.check_cluster(config), needs.check_memory(config), needs.check_root(config)]
    return [*checks, *_check_devices(config), needs.check_disk(config), *needs.check_sources(config)]


def require(checks: list[Check]) -> None:
    """Raise a `UserError` that lists what is missing, with the remedies."""
    missing = [f"{c.name}: needs {c.needed}, found {c.found}; {c.remedy}" for c in checks if not c.ok]
    if len(missing) > 1:
        raise UserError("\n  ".join([f"{len(missing)} things that the run needs are missing:", *missing]))
    if missing:
        raise UserError(missing[0])


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


def _start(config: Config) -> None:
    import ray
    from ray._private import ray_constants

    # Ray listens on every interface unless it takes this machine for one that cannot be in a cluster. It
    # reads the variable on import, which may have been before this; its processes read it when they start.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    store = max(LEAST_OBJECT_STORE, int(OBJECT_STORE_SHARE * config.cluster.memory_gib * GIB))
    ray.init(
        address="local",
        num_cpus=config.cluster.cpus,
        include_dashboard=False,
        object_store_memory=store,
        log_to_driver=False,
        logging_level="WARNING",
    )


def actor_options(
    config: Config, role: Role, count: int = 1, index: int = 0, threads: int | None = None
) -> dict[str, Any]:
    """Ray's options for actor number `index` of `count` of a role, in its place (`placement`).

    Raises:
        UserError: the cluster has no room for the run's actors.
    """
    options = placement(config).options(config, role, index)
    environment = actor_env(threads or config.cluster.cpus) | options["runtime_env"]["env_vars"]
    if role in ("rollout", "reward"):  # they work side by side: threads that spin while they wait would slow the other
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    return options | shares(config, role, count) | {"runtime_env": {"env_vars": environment}}


def _check_devices(config: Config) -> Iterator[Check]:
    """Whether the GPUs can be dealt out as `actor_options` does it."""
    gpus, learners = config.cluster.gpus, config.learners
    engines = config.rollout.engines * config.rollout.tensor_parallel  # their devices
    if gpus == 1:
        needed, good = "1 learner and 1 engine on the one GPU", learners == engines == 1
    elif config.shares_devices:
        needed, good = f"{engines} GPUs", gpus == 0 or gpus >= engines
    else:
        needed, good = f"{learners + engines + 1} GPUs", gpus == 0 or gpus > learners + engines
    remedy = "give each learner and engine a GPU and the reward workers one, or set cluster.gpus=1 with one of each"
    if not good:
        yield Check("cluster.gpus", needed, f"{gpus} for learners={learners}, engines={engines}", good, remedy)
    ranks, room = config.reward.devices, _training_room(config)
    if ranks > room:
        kind = "GPUs beside the engines'" if gpus else "CPUs"
        yield Check("reward.devices", f"{ranks} {kind}", str(room), False, f"set reward.devices={room} or less")


def _training_room(config: Config) -> int:
    """How many ranks can train at once; the engines keep their GPUs meanwhile, or share the only one."""
    gpus = config.cluster.gpus
    if gpus and config.shares_devices:
        return config.learners
    return max(1, gpus - config.rollout.engines * config.rollout.tensor_parallel if gpus else config.cluster.cpus)
