"""Ray for a run: start or join it, and see that all is there before anything starts."""

import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metaalign_rl import needs, needs_cluster, needs_estimated
from metaalign_rl.config import Config
from metaalign_rl.errors import UserError
from metaalign_rl.needs import Check
from metaalign_rl.plan.memory import object_store
from metaalign_rl.plan.nodes import Bundle
from metaalign_rl.plan.work import is_colocated

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
    checks = [*needs_cluster.check_counts(config), needs.check_memory(config), needs.check_root(config)]
    devices = list(needs_cluster.check_devices(config))
    checks += devices
    if needs.is_connected() and not devices:
        places = list(needs_cluster.check_places(bundles(config), needs_cluster.nodes()))
        checks += places or needs_cluster.check_free(bundles(config))
    if needs.is_connected() and os.environ.get("RAY_ADDRESS"):
        checks += needs_cluster.check_storage(config)
    checks += [needs.check_disk(config), *needs.check_sources(config)]
    return [*checks, *needs_estimated.check_estimates(config)]


def require(checks: list[Check]) -> None:
    """Raise a `UserError` that lists what is missing, with the remedies; warn of what is tight."""
    for check in checks:
        if check.tight:
            needed = f"{check.name}: needs {check.needed}, found {check.found}"
            print(f"warning: {needed}; if need be, {check.remedy}", file=sys.stderr)
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
    ray.init(
        address="local",
        num_cpus=config.cluster.cpus,
        include_dashboard=False,
        object_store_memory=object_store(config.cluster),
        log_to_driver=False,
        logging_level="WARNING",
    )


# The share of the run's CPUs, and of its GPU where it has one, that all actors of a role take together. The roles work
# in turns on the same devices, so a share is a place in Ray's books and no limit; each actor may use all of the run's
# threads. Where there are several GPUs, each learner, each engine and each rank that trains has a whole one, since Ray
# would pack shares of two learners onto one device, and the reward workers share one.
SHARES = {"training": 0.3, "rollout": 0.3, "learner": 0.3, "reward": 0.1}


def actor_options(config: Config, role: str, count: int = 1, threads: int | None = None) -> dict[str, Any]:
    """Ray's options for one of `count` actors of a role."""
    share = SHARES[role] / count
    env = actor_env(threads or config.cluster.cpus)
    if role in ("rollout", "reward"):  # they work side by side: threads that spin while they wait would slow the other
        env["OMP_WAIT_POLICY"] = "PASSIVE"
    return {
        "num_cpus": config.cluster.cpus * share,
        "num_gpus": config.cluster.gpus * share if config.cluster.gpus <= 1 else _whole_gpu(config, role, count),
        "runtime_env": {"env_vars": env},
    }


def _whole_gpu(config: Config, role: str, count: int) -> float:
    training = max(config.learners, config.reward.devices)
    devices = {"rollout": config.rollout.engines, "reward": 1, "training": training, "learner": config.learners}[role]
    return 1.0 if count <= devices else 1.0 / count


def bundles(config: Config) -> list[Bundle]:
    """What the PPO stage's actors ask of Ray, by what must lie on one node: an engine with all its devices.

    Colocated, an engine brings the learners on its devices along.
    """
    counts = {"learner": config.learners, "rollout": config.rollout.engines, "reward": config.ppo.reward_workers}
    asked = {role: actor_options(config, role, count) for role, count in counts.items()}
    names = {"learner": "learner", "rollout": "rollout engine", "reward": "reward worker"}
    return [
        Bundle(f"{names[role]} {number}", options["num_cpus"], _gpus(config, role, number, options["num_gpus"]))
        for role, options in asked.items()
        for number in range(counts[role])
    ]


def _gpus(config: Config, role: str, number: int, asked: float) -> float:
    """GPUs that an actor adds: an engine all of its devices; colocated, what shares an engine's device none."""
    if config.cluster.gpus <= 1:
        return asked
    if role == "rollout":
        return float(config.rollout.tensor_parallel)
    engines = config.rollout.engines * config.rollout.tensor_parallel
    shares = is_colocated(config) and (role == "reward" or number < engines)
    return 0.0 if shares else asked
