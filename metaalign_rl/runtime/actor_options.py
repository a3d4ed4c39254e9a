"""Ray options of a run's actors: resources, bundle, environment and threads. Imports no heavy packages."""

from typing import Any

from metaalign_rl.config.schema import Config
from metaalign_rl.core.units import GIB, MIB
from metaalign_rl.runtime import cpu_affinity
from metaalign_rl.runtime.placement import Role, actor_resources, get_placement

# By itself Ray does not hide a machine's GPUs from actors that ask for none, and torch would use them.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def actor_options(config: Config, role: Role, count: int = 1, index: int = 0) -> dict[str, Any]:
    """Ray's options for actor `index` of the `count` actors of a role, which share the run's CPUs equally.

    Raises:
        UserError: the cluster has no room for the run's actors.
    """
    options = get_placement(config).options(config, role, index)
    threads = threads_per_actor(config, count)
    environment = actor_environment(threads) | options["runtime_env"]["env_vars"]
    if role in ("rollout", "reward"):  # both work at the same time: threads that spin while idle would slow the other
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    if not config.cluster.gpus:
        environment |= NO_GPU
    if config.cluster.pin:
        environment |= cpu_affinity.pin_environment(index, threads)
    return options | actor_resources(config, role, count) | {"runtime_env": {"env_vars": environment}}


def actor_environment(threads: int) -> dict[str, str]:
    """Environment variables of an actor: limit it to `threads` threads, and let malloc keep freed memory.

    By default malloc returns freed memory to the system after every pass and requests it again page by page: 2,000 page
    faults per rollout of a small model.
    """
    return {
        "MALLOC_MMAP_THRESHOLD_": str(32 * MIB),
        "MALLOC_TRIM_THRESHOLD_": str(GIB),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def threads_per_actor(config: Config, count: int) -> int:
    """Threads of each of the `count` actors of a role. Roles take turns, so each role may use all CPUs of the run."""
    return max(1, config.cluster.cpus // count)
