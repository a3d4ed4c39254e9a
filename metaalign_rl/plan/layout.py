"""Proposes a layout for given devices: of the layouts that fit their memory, the one with the shortest step."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from operator import attrgetter
from typing import Literal

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.units import GIB
from metaalign_rl.plan import memory, trainings
from metaalign_rl.plan.speed import step_seconds
from metaalign_rl.plan.work import Case, Settings, apply

MAX_FILL = 0.9  # share of a device's memory that an estimate may fill
ENGINE_SHARE = 0.9  # share of a device's memory for an engine, if nothing else uses the device
MICRO_BATCHES = (2048, 4096, 8192, 16_384, 32_768, 65_536)  # tokens
TENSOR_PARALLEL = (1, 2, 4, 8)  # devices per engine; more would not fit one node


@dataclass(frozen=True, slots=True)
class Devices:
    """The available devices: `gpus` GPUs, spread evenly over `nodes` machines; 0 GPUs: CPUs."""

    gpus: int
    nodes: int

    @property
    def gpus_per_node(self) -> int:
        """GPUs of each machine."""
        return self.gpus // self.nodes


def propose(case: Case, devices: Devices) -> Settings:
    """The settings of the fastest layout that fits, by estimate.

    Raises:
        UserError: no layout fits; the message says how much memory the smallest one needs.
    """
    if not devices.gpus:
        return {"cluster.gpus": 0, "learner.world_size": 1, "rollout.engines": 1, "rollout.tensor_parallel": 1}
    for offload in (False, True):  # offloading is slower, so only if nothing else fits
        fitting = [settings for settings in _layouts(case, devices, offload) if fits(apply(case, settings))]
        if fitting:
            return _with_trainings(case, fitting)
    raise UserError(_too_large_message(case, devices))


def _with_trainings(case: Case, fitting: list[Settings]) -> Settings:
    """The fastest of the layouts in which SFT and the reward model's training fit too; else the fastest."""
    ordered = sorted(fitting, key=lambda settings: step_seconds(apply(case, settings))["step"])
    proposals: dict[tuple[int, int], Settings] = {}  # by what the trainings depend on
    for settings in ordered:
        planned = apply(case, settings)
        key = planned.config.learner.world_size, trainings.max_training_ranks(planned)
        if key not in proposals:
            proposals[key] = settings | trainings.propose(planned, MAX_FILL)
            if not trainings.problems(apply(case, proposals[key]), MAX_FILL):
                return proposals[key]
    return next(iter(proposals.values()))


def changes(case: Case, settings: Settings) -> Settings:
    """The settings that differ from the case's config."""
    return {key: value for key, value in settings.items() if attrgetter(key)(case.config) != value}


def fits(case: Case) -> bool:
    """Whether each device's estimate is within `MAX_FILL`, and an engine's KV cache holds the longest sequence."""
    assert case.device.memory_gib is not None
    room = MAX_FILL * case.device.memory_gib * GIB
    shared = case.config.shares_devices
    needed = memory.colocated_memory(case) if shared else sum(memory.learner_memory(case).values())
    reward = sum(memory.reward_memory(case).values())
    together = needed + reward if shared else max(needed, reward)
    return together <= room and memory.kv_tokens(case) >= case.config.model.max_tokens


def _layouts(case: Case, devices: Devices, offload: bool) -> Iterator[Settings]:
    for parallel, learners, layout in product(TENSOR_PARALLEL, _learners(case, devices), _kinds(case, devices)):
        engines = _engines(devices, learners, parallel, layout)
        if engines < 1:
            continue
        base: Settings = {
            "cluster.gpus": devices.gpus, "cluster.layout": layout, "learner.world_size": learners,
            "rollout.engines": engines, "rollout.tensor_parallel": parallel, "ppo.reward_workers": 1,
            "model.dtype": "bfloat16", "sft.batch_size": -(-case.config.sft.batch_size // learners) * learners,
            "sft.gradient_accumulation": 1,
        }  # fmt: skip
        for stage, checkpointing, tokens, moves in product((1, 2, 3), (False, True), MICRO_BATCHES, (False, True)):
            if moves and (layout == "disaggregated" or stage == 3 or offload):
                continue
            settings = base | {
                "learner.zero_stage": stage, "learner.gradient_checkpointing": checkpointing,
                "learner.micro_batch_tokens": tokens, "learner.offload_optimizer": offload,
                "learner.offload_states": moves,
            }  # fmt: skip
            yield settings | {"rollout.gpu_memory_utilization": _engine_share(apply(case, settings))}


def _kinds(case: Case, devices: Devices) -> tuple[Literal["disaggregated", "colocated"], ...]:
    if case.config.ppo.staleness:
        return ("disaggregated",)
    return ("disaggregated", "colocated") if devices.gpus > 1 else ("colocated",)


def _learners(case: Case, devices: Devices) -> list[int]:
    """The numbers of learners to try: powers of two, the GPUs of complete nodes, and all GPUs."""
    powers = {2**power for power in range(12)}
    nodes = {devices.gpus_per_node * count for count in range(1, devices.nodes + 1)}
    most = min(devices.gpus, case.config.learner.minibatch_size)
    return sorted(count for count in powers | nodes | {devices.gpus} if count <= most)


def _engines(devices: Devices, learners: int, parallel: int, layout: str) -> int:
    """Engines on the GPUs that the learners and the reward workers' GPU leave, each within one node."""
    if layout == "colocated":
        return learners // parallel if learners == devices.gpus and devices.gpus_per_node % parallel == 0 else 0
    return min((devices.gpus - learners - 1) // parallel, devices.nodes * (devices.gpus_per_node // parallel))


def _engine_share(case: Case) -> float:
    """The share of a device's memory for an engine: the rest after the learner's states, in steps of 0.05."""
    assert case.device.memory_gib is not None
    if not case.config.shares_devices:
        return ENGINE_SHARE
    states = memory.resting_memory(case) + sum(memory.reward_memory(case).values())
    left = MAX_FILL - states / (case.device.memory_gib * GIB)
    return max(0.05, int(left * 20) / 20)


def _too_large_message(case: Case, devices: Devices) -> str:
    """The memory that the smallest layout needs."""
    assert case.device.memory_gib is not None
    cases = [apply(case, settings) for settings in _layouts(case, devices, offload=True)]
    in_bfloat16 = apply(case, {"model.dtype": "bfloat16", "learner.zero_stage": 3})
    least = min((sum(memory.learner_memory(smaller).values()) for smaller in cases), default=0.0) / GIB
    reward = sum(memory.reward_memory(in_bfloat16).values()) / GIB
    room = MAX_FILL * case.device.memory_gib
    return (
        f"{devices.gpus} x {case.device.title} are too small: a learner needs {least:.0f} GiB at ZeRO-3 with gradient "
        f"checkpointing and optimizer offloading, and the reward model {reward:.0f} GiB on one GPU, of {room:.0f} GiB "
        "that an estimate may fill; give more or larger GPUs, a smaller --model, or a scorer elsewhere as reward.url"
    )
