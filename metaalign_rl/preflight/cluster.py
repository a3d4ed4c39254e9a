"""What a run's actors ask of the cluster, compared with its nodes: counts, places, storage. Light."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metaalign_rl.config.schema import Config
from metaalign_rl.core.units import GIB
from metaalign_rl.preflight.bin_packing import NamedBundle, Node, counted, unplaced
from metaalign_rl.preflight.checks import PreflightCheck, is_writable
from metaalign_rl.runtime.ray_session import is_connected


def gpus_by_role(config: Config) -> dict[str, int]:
    """GPUs that each role has: "learners", "engines", "reward"; colocated roles share theirs.

    Disaggregated, each learner has one, each engine as many as work on it together, and the reward workers share one.
    """
    engines = config.rollout.engines * config.rollout.tensor_parallel
    return {"learners": config.learner.world_size, "engines": engines, "reward": 1} if config.cluster.gpus else {}


def gpus_needed(config: Config) -> int:
    """GPUs of the PPO stage."""
    found = gpus_by_role(config)
    return max(found.values(), default=0) if config.shares_devices else sum(found.values())


def check_devices(config: Config) -> Iterator[PreflightCheck]:
    """Whether the GPUs can be dealt out to learners, engines and reward workers."""
    gpus, needed = config.cluster.gpus, gpus_needed(config)
    if needed > gpus:
        roles = ", ".join(f"{role} {count}" for role, count in gpus_by_role(config).items())
        kind = "colocated" if config.shares_devices else "disaggregated"
        less = "lower learner.world_size or rollout.engines"
        other = less if kind == "colocated" else f"{less}, or set cluster.layout=colocated, which shares GPUs"
        remedy = f"set cluster.gpus={needed} where there are as many, {other}"
        yield PreflightCheck("cluster.gpus", f"{needed} GPUs ({kind}: {roles})", str(gpus), False, remedy)
    ranks, room = config.reward.devices, training_room(config)
    if ranks > room:
        kind = "GPUs beside the engines'" if gpus else "CPUs"
        yield PreflightCheck(
            "reward.devices", f"{ranks} {kind}", str(room), False, f"set reward.devices={room} or less"
        )


def training_room(config: Config) -> int:
    """How many ranks can train at once; the engines keep their GPUs meanwhile, or share the only one."""
    gpus = config.cluster.gpus
    if gpus and config.shares_devices:
        return config.learner.world_size
    engines = config.rollout.engines * config.rollout.tensor_parallel
    return max(1, gpus - engines if gpus else config.cluster.cpus)


def nodes() -> list[Node]:
    """The living nodes of the cluster that this process is connected to."""
    import ray

    return [_node(entry) for entry in ray.nodes() if entry["Alive"]]


def _node(entry: dict[str, Any]) -> Node:
    resources = entry["Resources"]
    name = f"node {entry['NodeManagerAddress']} ({entry['NodeID'][:6]})"  # nodes of one machine share its address
    memory = resources.get("memory", 0.0) / GIB
    return Node(name, resources.get("CPU", 0.0), resources.get("GPU", 0.0), memory)


def check_places(bundles: list[NamedBundle], found: list[Node]) -> Iterator[PreflightCheck]:
    """One check for each bundle that no node can take: Ray would let its actor wait without a word."""
    for bundle, reason in unplaced(bundles, found):
        needed = f"{counted(bundle.gpus, 'GPU')} and {counted(bundle.cpus, 'CPU')} on one node"
        name = "rollout.tensor_parallel" if bundle.gpus > 1 else "cluster.gpus" if bundle.gpus else "cluster.cpus"
        remedy = {
            "rollout.tensor_parallel": "lower it to at most a node's GPUs, or the actors beside it",
            "cluster.gpus": "set learner.world_size or rollout.engines lower, or add a node",
            "cluster.cpus": "set cluster.cpus lower: each actor asks for its share of them; or add a larger node",
        }[name]
        yield PreflightCheck(name, f"{needed} for {bundle.who}", reason, False, remedy)


def check_free(bundles: list[NamedBundle]) -> Iterator[PreflightCheck]:
    """A warning where other jobs hold what the actors will ask for: they would wait until those end."""
    import ray

    free = ray.available_resources()
    sums = {"GPU": sum(bundle.gpus for bundle in bundles), "CPU": sum(bundle.cpus for bundle in bundles)}
    for kind, needed in sums.items():
        found = free.get(kind, 0.0)
        if needed > found + 1e-6:
            remedy = "wait for the other jobs, or stop them: `ray status` and `ray job list` say who has what"
            text = f"{needed:g} {kind}s that no other job holds"
            yield PreflightCheck(f"cluster.{kind.lower()}s", text, f"{found:g} free", True, remedy, tight=True)


def check_storage(config: Config) -> Iterator[PreflightCheck]:
    """Whether every node sees what this one writes under run.root."""
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
        seen = ray.get([exists.options(scheduling_strategy=node).remote(str(mark)) for node in pinned])
    finally:
        mark.unlink()
    blind = [node["NodeManagerAddress"] for node, sees in zip(others, seen, strict=True) if not sees]
    yield PreflightCheck(
        "run.root",
        "storage that every node sees",
        f"{root}, which {', '.join(blind)} cannot see" if blind else f"seen by {len(others) + 1} nodes",
        not blind,
        "give a folder on shared storage, such as a mounted volume",
    )


def check_counts(config: Config) -> Iterator[PreflightCheck]:
    """CPUs and GPUs over all nodes.

    A cluster on this machine has as many CPUs as the machine, whatever it was told. GPUs and other clusters
    are known only once Ray is connected, and left out before.
    """
    is_local = not os.environ.get("RAY_ADDRESS")
    where = "this machine" if is_local else "the cluster"
    resources: dict[str, float] = {}
    if is_connected():
        import ray

        resources = ray.cluster_resources()
    if is_local:
        resources["CPU"] = len(os.sched_getaffinity(0))
    for name, kind, needed in (("cpus", "CPU", config.cluster.cpus), ("gpus", "GPU", config.cluster.gpus)):
        if is_connected() or kind in resources:
            found = int(resources.get(kind, 0))
            remedy = f"{where} has {found}: set cluster.{name}={found}, or run where there are more"
            yield PreflightCheck(f"cluster.{name}", f"{needed} {kind}s", str(found), found >= needed, remedy)
