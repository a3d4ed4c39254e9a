"""Checks of the estimated memory and disk of the stages sft, reward and ppo. Imports no heavy packages."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from metaalign_rl.config.schema import Config
from metaalign_rl.config.sections import OBJECT_STORE_SHARE
from metaalign_rl.core.units import GIB, counted
from metaalign_rl.plan import memory, stages
from metaalign_rl.plan.case import case_of
from metaalign_rl.plan.page import memory_table
from metaalign_rl.plan.rates import Device, find_device, names
from metaalign_rl.plan.work import Case
from metaalign_rl.preflight.checks import PreflightCheck, free_memory, nearest_folder
from metaalign_rl.preflight.cluster import gpus_by_role
from metaalign_rl.runtime.placement import bundle_indices
from metaalign_rl.runtime.ray_session import is_connected

PORTS = (
    "Ports: the run opens no fixed ports. If it starts Ray, Ray listens on the loopback only. Learners find each\n"
    "other through a file in the run's folder. Between nodes, their collectives (NCCL, gloo) use ports that the\n"
    "system assigns."
)
FEWER_TOKENS = {
    "sft": "raise sft.gradient_accumulation, set sft.gradient_checkpointing=true, or lower sft.batch_size, "
    "model.max_tokens",
    "reward": "raise reward.gradient_accumulation, set reward.gradient_checkpointing=true, or lower reward.batch_size, "
    "model.max_tokens, the number of reward.controls",
    "ppo": "lower learner.micro_batch_tokens, rollout.kv_cache_gib",
}
TOLERANCE = 1.3  # within this factor a shortfall is a warning, beyond it an error


def find_case(config: Config) -> Case | None:
    """The case to estimate, on the cluster's GPUs or on CPUs.

    Returns:
        None if nothing can be estimated: no stage that needs much memory runs, or the kind of GPU or the model's shape
        is not known.
    """
    if not stages.estimated_stages(config):
        return None
    if not config.cluster.gpus:
        return case_of(config)
    device = _gpu()
    return case_of(config, device) if device else None


def _gpu() -> Device | None:
    """The cluster's kind of GPU, from Ray's resource names; None if Ray does not name it or `rates.json` lacks it."""
    if not is_connected():
        return None
    import ray

    kinds = [name.partition(":")[2].lower() for name in ray.cluster_resources() if name.startswith("accelerator_type:")]
    known = [kind.replace("-40g", "-40gb").replace("a10g", "a10") for kind in kinds]
    return next((find_device(kind) for kind in known if kind in names()), None)


def check_estimates(config: Config) -> Iterator[PreflightCheck]:
    """Checks of device memory by role, or of main memory on CPUs, of Ray's object store, and of the disk."""
    case = find_case(config)
    if case is None:
        return
    if case.device.is_cpu:
        yield _check_host(case)
    else:
        yield from _check_training_gpus(case)
    if "ppo" in config.run.stages:
        if not case.device.is_cpu:
            yield from _check_gpus(case)
        yield _check_store(case)
        yield _check_disk(case)


def _compare(name: str, what: str, needed: float, found: float, remedy: str) -> PreflightCheck:
    """Compare an estimate with the amount found, both in bytes; see `TOLERANCE`."""
    texts = f"{what}, by estimate {needed / GIB:.3g} GiB", f"{found / GIB:.3g} GiB"
    ok = needed <= TOLERANCE * found
    return PreflightCheck(name, *texts, ok=ok, remedy=remedy, is_warning=ok and needed > found)


def _check_host(case: Case) -> PreflightCheck:
    """The stage that needs the most memory."""
    found = stages.host_memory(case)
    stage, parts = max(found.items(), key=lambda item: sum(item[1].values()))
    largest = max(parts, key=lambda part: parts[part])
    remedy = f"{FEWER_TOKENS[stage]} or the model's size; most of it is for {largest}"
    return _compare(
        "memory", f"memory for all processes of the stage {stage}", sum(parts.values()), free_memory(), remedy
    )


def _check_training_gpus(case: Case) -> Iterator[PreflightCheck]:
    """SFT and the reward model's training, next to engines that sleep on the same GPU."""
    assert case.device.memory_gib is not None
    roles, room = stages.device_memory(case), case.device.memory_gib * GIB
    for role, stage in (("SFT", "sft"), ("reward training", "reward")):
        if role in roles:
            needed = stages.training_memory(case, stage)
            yield _compare(stage, f"a GPU for a rank of {role}", needed, room, FEWER_TOKENS[stage])


def _check_gpus(case: Case) -> Iterator[PreflightCheck]:
    assert case.device.memory_gib is not None
    learner, engine, room = memory.learner_memory(case), memory.engine_memory(case), case.device.memory_gib * GIB
    fewer = "set learner.zero_stage=3 or gradient_checkpointing=true, lower micro_batch_tokens, or raise world_size"
    if case.config.shares_devices:
        needed = memory.colocated_memory(case)
        remedy = f"{fewer}, or set cluster.layout=disaggregated"
        yield _compare("learner", "a GPU for a learner and an engine", needed, room, remedy)
    else:
        yield _compare("learner", "a GPU for a learner", sum(learner.values()), room, fewer)
    on_one = math.ceil(case.config.ppo.reward_workers / len(bundle_indices(case.config, "reward")))
    reward = sum(memory.reward_memory(case).values()) * on_one
    remedy = "lower ppo.reward_workers, or serve the reward model elsewhere and set reward.url"
    yield _compare("ppo.reward_workers", "a GPU for its reward workers", reward, room, remedy)
    tokens, longest = memory.kv_tokens(case), case.config.model.max_tokens
    found = f"room for {tokens:.0f} ({engine['KV cache'] / GIB:.1f} GiB)"
    remedy = "raise rollout.gpu_memory_utilization or rollout.tensor_parallel"
    yield PreflightCheck("rollout", f"a KV cache for {longest} tokens", found, tokens >= longest, remedy)


def _check_store(case: Case) -> PreflightCheck:
    """On CPUs, a weight sync passes through Ray's object store."""
    needed = memory.object_store_memory(case)
    store = case.config.cluster.object_store_bytes
    enough = needed / OBJECT_STORE_SHARE / GIB
    share = f"the store is {OBJECT_STORE_SHARE:.0%} of it"
    remedy = f"lower rollout.bucket_mib, or set cluster.memory_gib={enough:.0f} or more; {share}"
    return _compare("cluster.memory_gib", "Ray's object store for weights", needed, store, remedy)


def _check_disk(case: Case) -> PreflightCheck:
    needed = sum(memory.disk_bytes(case).values())
    found = shutil.disk_usage(nearest_folder(Path(case.config.run.root))).free
    remedy = "give a run.root on a larger disk, or raise run.keep_rollouts"
    return _compare("run.root", "disk for checkpoints, models and rollouts", needed, found, remedy)


def describe(config: Config, case: Case | None) -> str:
    """The resources of the stages as text: devices by role, memory by part, ports."""
    roles = ", ".join(f"{role} {count}" for role, count in gpus_by_role(config).items())
    layout = "colocated" if config.shares_devices else "disaggregated"
    devices = (
        f"GPUs: {roles} ({layout})"
        if roles
        else f"Devices: {counted(config.cluster.cpus, 'CPU')}, which all roles use in turns"
    )
    tables = (
        "Memory is not estimated: the shape of the model or the kind of GPU is unknown."
        if case is None
        else memory_table(case)
    )
    return f"{devices}\n{tables}\n{PORTS}"
