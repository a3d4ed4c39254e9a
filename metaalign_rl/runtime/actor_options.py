"""Ray options of a run's actors: resources, bundle, environment and threads. Imports no heavy packages."""

from typing import Any

from metaalign_rl.config.schema import Config
from metaalign_rl.core.units import GIB, MIB
from metaalign_rl.runtime import cpu_affinity, placement
from metaalign_rl.runtime.placement import Role


def actor_options(
    config: Config, role: Role, count: int = 1, index: int = 0, threads: int | None = None
) -> dict[str, Any]:
    """Ray's options for actor `index` of the `count` actors of a role.

    Args:
        threads: threads of the actor; by default an equal share of the run's CPUs.

    Raises:
        UserError: the cluster has no room for the run's actors.
    """
    options = placement.placement(config).options(config, role, index)
    threads = threads or threads_of(config, count)
    environment = actor_env(threads) | options["runtime_env"]["env_vars"]
    if role in ("rollout", "reward"):  # both work at the same time: threads that spin while idle would slow the other
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    if config.cluster.pin:
        environment |= cpu_affinity.request(index, threads)
    return options | placement.shares(config, role, count) | {"runtime_env": {"env_vars": environment}}


def actor_env(threads: int) -> dict[str, str]:
    """Environment variables for an actor's `runtime_env`: they limit it to `threads` threads and keep its freed memory.

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


def threads_of(config: Config, count: int) -> int:
    """Threads per actor if `count` actors of one role share the CPUs. Roles take turns, so each may use all CPUs."""
    return max(1, config.cluster.cpus // count)
