"""What the PPO stage needs by estimate, compared with what is there. Light."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from metaalign_rl.config.schema import Config
from metaalign_rl.config.sections import OBJECT_STORE_SHARE
from metaalign_rl.core.units import GIB
from metaalign_rl.plan import memory
from metaalign_rl.plan.case import case_of
from metaalign_rl.plan.page import memory_table
from metaalign_rl.plan.rates import Device, find_device, names
from metaalign_rl.plan.work import Case
from metaalign_rl.preflight.checks import PreflightCheck, free_memory, nearest_folder
from metaalign_rl.preflight.cluster import gpus_by_role
from metaalign_rl.runtime.ray_session import is_connected

PORTS = (
    "Ports: none of its own. A Ray that the run starts listens on the loopback; learners meet in a file of the run's\n"
    "folder, and between nodes their collective operations open ports that the system gives (NCCL, gloo)."
)
TRUST = 1.3  # an estimate may be this much too high: what is there up to this factor is tight, above it missing


def find_case(config: Config) -> Case | None:
    """The config's case on the GPUs that Ray sees, or on CPUs; None: nothing can be estimated."""
    if "ppo" not in config.run.stages:
        return None
    if not config.cluster.gpus:
        return case_of(config)
    device = _gpu()
    return case_of(config, device) if device else None


def _gpu() -> Device | None:
    """The kind of GPU that the cluster has, by what Ray calls it; None where Ray does not say, or we do not know."""
    if not is_connected():
        return None
    import ray

    kinds = [name.partition(":")[2].lower() for name in ray.cluster_resources() if name.startswith("accelerator_type:")]
    known = [kind.replace("-40g", "-40gb").replace("a10g", "a10") for kind in kinds]
    return next((find_device(kind) for kind in known if kind in names()), None)


def check_estimates(config: Config) -> Iterator[PreflightCheck]:
    """Memory a device by role, main memory, the object store and the disk."""
    case = find_case(config)
    if case is None:
        return
    if case.device.is_cpu:
        yield _check_host(case)
    else:
        yield from _check_gpus(case)
    yield _check_store(case)
    yield _check_disk(case)


def compare(name: str, what: str, needed: float, found: float, remedy: str) -> PreflightCheck:
    """An estimate in bytes beside what is there; see `TRUST`."""
    texts = f"{what}, by estimate {needed / GIB:.3g} GiB", f"{found / GIB:.3g} GiB"
    return PreflightCheck(
        name, *texts, ok=needed <= TRUST * found, remedy=remedy, tight=found < needed <= TRUST * found
    )


def _check_host(case: Case) -> PreflightCheck:
    parts = memory.host_memory(case)
    largest = max(parts, key=lambda part: parts[part])
    remedy = f"most of it is for {largest}: lower learner.micro_batch_tokens, rollout.kv_cache_gib or the model's size"
    return compare("memory", "memory for all processes", sum(parts.values()), free_memory(), remedy)


def _check_gpus(case: Case) -> Iterator[PreflightCheck]:
    assert case.device.memory_gib is not None
    learner, engine, room = memory.learner_memory(case), memory.engine_memory(case), case.device.memory_gib * GIB
    fewer = "set learner.zero_stage=3, gradient_checkpointing=true, micro_batch_tokens lower, or world_size higher"
    if case.config.shares_devices:
        needed = memory.colocated_memory(learner, engine)
        yield compare(
            "learner", "a GPU for a learner and an engine", needed, room, f"{fewer}; or cluster.layout=disaggregated"
        )
    else:
        yield compare("learner", "a GPU for a learner", sum(learner.values()), room, fewer)
    reward = sum(memory.reward_memory(case).values()) * case.config.ppo.reward_workers
    remedy = "lower ppo.reward_workers, or serve the reward model elsewhere and give reward.url"
    yield compare("ppo.reward_workers", "the reward workers' GPU", reward, room, remedy)
    tokens, longest = memory.kv_tokens(case), case.config.model.max_tokens
    found = f"{tokens:.0f} tokens' ({engine['KV cache'] / GIB:.1f} GiB)"
    remedy = "set rollout.gpu_memory_utilization or rollout.tensor_parallel higher"
    yield PreflightCheck("rollout", f"room for {longest} tokens' keys and values", found, tokens >= longest, remedy)


def _check_store(case: Case) -> PreflightCheck:
    """Weights pass through Ray's object store on CPUs."""
    needed = memory.in_store(case)
    store = case.config.cluster.object_store_bytes
    enough = needed / OBJECT_STORE_SHARE / GIB
    share = f"a share of {OBJECT_STORE_SHARE:g} of it is the store"
    remedy = f"set rollout.bucket_mib lower, or cluster.memory_gib={enough:.0f} or more: {share}"
    return compare("cluster.memory_gib", "Ray's object store for weights", needed, store, remedy)


def _check_disk(case: Case) -> PreflightCheck:
    needed = sum(memory.disk(case).values())
    found = shutil.disk_usage(nearest_folder(Path(case.config.run.root))).free
    remedy = "give a run.root on a larger disk, or set run.keep_rollouts higher"
    return compare("run.root", "disk for checkpoints, models and rollouts", needed, found, remedy)


def describe(config: Config, case: Case | None) -> str:
    """What the PPO stage takes, for reading: devices by role, memory by part, ports."""
    roles = ", ".join(f"{role} {count}" for role, count in gpus_by_role(config).items())
    kind = "colocated" if config.shares_devices else "disaggregated"
    devices = (
        f"GPUs: {roles} ({kind})"
        if roles
        else f"Devices: the run's {config.cluster.cpus} CPUs, taken in turns by all roles"
    )
    tables = (
        "Memory is not estimated: the shape of the model, or the kind of GPU, is not known."
        if case is None
        else memory_table(case)
    )
    return f"{devices}\n{tables}\n{PORTS}"
