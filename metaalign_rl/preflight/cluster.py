"""Checks of the cluster: counts of devices, room for all actors, shared storage. Imports no heavy packages."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metaalign_rl.config.schema import Config
from metaalign_rl.core.units import GIB, counted
from metaalign_rl.preflight.bin_packing import NamedBundle, Node, unplaced
from metaalign_rl.preflight.checks import PreflightCheck, is_writable
from metaalign_rl.runtime.placement import reward_bundles
from metaalign_rl.runtime.ray_session import is_connected


def gpus_by_role(config: Config) -> dict[str, int]:
    """GPUs of each role: "learners", "engines" and "reward". Empty without GPUs.

    Each learner has one GPU, each engine `rollout.tensor_parallel`, and each reward worker with a model one. Colocated
    roles share their GPUs.
    """
    if not config.cluster.gpus:
        return {}
    engines = config.rollout.engines * config.rollout.tensor_parallel
    reward = 1 if config.shares_devices else reward_bundles(config)
    return {"learners": config.learner.world_size, "engines": engines, "reward": reward}


def gpus_needed(config: Config) -> int:
    """GPUs that the stage ppo needs."""
    found = gpus_by_role(config)
    return max(found.values(), default=0) if config.shares_devices else sum(found.values())


def check_devices(config: Config) -> Iterator[PreflightCheck]:
    """Whether `cluster.gpus` is enough for learners, engines and reward workers, and for reward training."""
    gpus, needed = config.cluster.gpus, gpus_needed(config)
    if needed > gpus:
        roles = ", ".join(f"{role} {count}" for role, count in gpus_by_role(config).items())
        layout = "colocated" if config.shares_devices else "disaggregated"
        remedy = f"set cluster.gpus={needed} if there are as many, or lower learner.world_size or rollout.engines"
        if not config.shares_devices:
            remedy += ", or set cluster.layout=colocated, which shares GPUs"
        needs = f"{counted(needed, 'GPU')} ({layout}: {roles})"
        yield PreflightCheck("cluster.gpus", needs, str(gpus), False, remedy)
    ranks, most = config.reward.devices, max_training_ranks(config)
    if ranks > most:
        needs = f"{counted(ranks, 'GPU')} in addition to the engines'" if gpus else counted(ranks, "CPU")
        yield PreflightCheck("reward.devices", needs, str(most), False, f"set reward.devices={most} or less")


def max_training_ranks(config: Config) -> int:
    """How many ranks can train at the same time. The engines keep their GPUs during training, or share the only GPU."""
    gpus = config.cluster.gpus
    if gpus and config.shares_devices:
        return config.learner.world_size
    engines = config.rollout.engines * config.rollout.tensor_parallel
    return max(1, gpus - engines if gpus else config.cluster.cpus)


def nodes() -> list[Node]:
    """The living nodes of the connected cluster."""
    import ray

    return [_node(entry) for entry in ray.nodes() if entry["Alive"]]


def _node(entry: dict[str, Any]) -> Node:
    resources = entry["Resources"]
    name = f"node {entry['NodeManagerAddress']} ({entry['NodeID'][:6]})"  # nodes on one machine share its address
    memory = resources.get("memory", 0.0) / GIB
    return Node(name, resources.get("CPU", 0.0), resources.get("GPU", 0.0), memory)


def check_bundles(bundles: list[NamedBundle], cluster_nodes: list[Node]) -> Iterator[PreflightCheck]:
    """One check for each bundle that fits no node. Ray would let its actors wait without a message."""
    for bundle, reason in unplaced(bundles, cluster_nodes):
        amounts = {"GPU": bundle.gpus, "CPU": bundle.cpus}
        needed = " and ".join(counted(amount, kind) for kind, amount in amounts.items() if amount)
        name = "rollout.tensor_parallel" if bundle.gpus > 1 else "cluster.gpus" if bundle.gpus else "cluster.cpus"
        fewer = "lower learner.world_size or rollout.engines"
        remedy = {
            "rollout.tensor_parallel": f"set it to at most the GPUs of a node, or {fewer}",
            "cluster.gpus": f"{fewer}, or add a node",
            "cluster.cpus": "lower cluster.cpus, of which each actor needs a share, or add a larger node",
        }[name]
        yield PreflightCheck(name, f"{needed} on one node for {bundle.who}", f"none: {reason}", False, remedy)


def check_free(bundles: list[NamedBundle]) -> Iterator[PreflightCheck]:
    """A warning if other jobs use resources that the actors need. The actors would wait until those jobs end."""
    import ray

    free = ray.available_resources()
    sums = {"GPU": sum(bundle.gpus for bundle in bundles), "CPU": sum(bundle.cpus for bundle in bundles)}
    for kind, needed in sums.items():
        found = free.get(kind, 0.0)
        if needed > found + 1e-6:
            needs = f"{counted(needed, kind)} that no other job uses"
            remedy = "wait for the other jobs, or stop them; `ray status` and `ray job list` show them"
            yield PreflightCheck(f"cluster.{kind.lower()}s", needs, f"{found:g} free", True, remedy, is_warning=True)


def check_storage(config: Config) -> Iterator[PreflightCheck]:
    """Whether every node sees a file that this node writes in `run.root`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    root = Path(config.run.root).absolute()
    if not others or not is_writable(root):
        return
    root.mkdir(parents=True, exist_ok=True)
    mark = root / f".seen-by-every-node-{os.getpid()}"
    mark.touch()
    pinned = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in others]
    exists = ray.remote(num_cpus=0)(os.path.exists)
    try:
        found = ray.get([exists.options(scheduling_strategy=node).remote(str(mark)) for node in pinned])
    finally:
        mark.unlink()
    without = [node["NodeManagerAddress"] for node, is_there in zip(others, found, strict=True) if not is_there]
    yield PreflightCheck(
        "run.root",
        "storage that every node sees",
        f"{root}, which {', '.join(without)} cannot see" if without else f"seen by {len(others) + 1} nodes",
        not without,
        "give a folder on shared storage, such as a mounted volume",
    )


def check_counts(config: Config) -> Iterator[PreflightCheck]:
    """Whether there are `cluster.cpus` CPUs and `cluster.gpus` GPUs, summed over all nodes.

    For Ray on this machine, the machine's own CPUs count. GPUs, and the CPUs of a joined cluster, are known only when
    Ray is connected; before, they are not checked.
    """
    is_local = not os.environ.get("RAY_ADDRESS")
    where = "on a machine with more" if is_local else "on a larger cluster"
    resources: dict[str, float] = {}
    if is_connected():
        import ray

        resources = ray.cluster_resources()
    if is_local:
        resources["CPU"] = len(os.sched_getaffinity(0))
    for name, kind, needed in (("cpus", "CPU", config.cluster.cpus), ("gpus", "GPU", config.cluster.gpus)):
        if is_connected() or kind in resources:
            found = int(resources.get(kind, 0))
            remedy = f"set cluster.{name}={found}, or run {where}"
            yield PreflightCheck(f"cluster.{name}", counted(needed, kind), str(found), found >= needed, remedy)
