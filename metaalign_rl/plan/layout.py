"""A layout for the devices that there are: of those whose memory suffices, the one with the shortest step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from operator import attrgetter
from typing import Any, Literal, TypeAlias

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.units import GIB
from metaalign_rl.plan import memory
from metaalign_rl.plan.speed import step_seconds
from metaalign_rl.plan.work import Case

HEADROOM = 0.9  # of a device's memory that an estimate may fill
ENGINE_SHARE = 0.9  # of a device that an engine has to itself
MICRO_BATCHES = (2048, 4096, 8192, 16_384, 32_768, 65_536)  # tokens
PARALLEL = (1, 2, 4, 8)  # devices of an engine; more would leave a node

Words: TypeAlias = dict[str, Any]  # settings by dotted key


@dataclass(frozen=True, slots=True)
class Devices:
    """What there is to deal out: `gpus` over `nodes` alike machines; none: CPUs."""

    gpus: int
    nodes: int

    @property
    def a_node(self) -> int:
        """GPUs of one node."""
        return self.gpus // self.nodes


def propose(case: Case, devices: Devices) -> Words:
    """The settings of the layout.

    Raises:
        UserError: none fits; says how much the least one needs.
    """
    if not devices.gpus:
        return {"cluster.gpus": 0, "learner.world_size": 1, "rollout.engines": 1, "rollout.tensor_parallel": 1}
    for offload in (False, True):  # slower, so only where nothing else fits
        fitting = [words for words in _layouts(case, devices, offload) if fits(apply(case, words))]
        if fitting:
            return min(fitting, key=lambda words: step_seconds(apply(case, words))["step"])
    raise UserError(_too_large(case, devices))


def apply(case: Case, words: Words) -> Case:
    """The case under other settings."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in words.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    changed = {name: replace(getattr(case.config, name), **values) for name, values in sections.items()}
    return replace(case, config=replace(case.config, **changed))


def changes(case: Case, words: Words) -> Words:
    """Those of the words that say something else than the case's config."""
    return {key: value for key, value in words.items() if attrgetter(key)(case.config) != value}


def fits(case: Case) -> bool:
    """Whether every device holds its part, with headroom, and an engine the longest sequence."""
    assert case.device.memory_gib is not None
    room = HEADROOM * case.device.memory_gib * GIB
    learner, engine = memory.learner_memory(case), memory.engine_memory(case)
    shared = case.config.shares_devices
    needed = memory.colocated_memory(learner, engine) if shared else sum(learner.values())
    reward = sum(memory.reward_memory(case).values())
    together = needed + reward if shared else max(needed, reward)
    return together <= room and memory.kv_tokens(case) >= case.config.model.max_tokens


def _layouts(case: Case, devices: Devices, offload: bool) -> Iterator[Words]:
    for parallel, learners, layout in product(PARALLEL, _learners(case, devices), _kinds(case, devices)):
        engines = _engines(devices, learners, parallel, layout)
        if engines < 1:
            continue
        base: Words = {
            "cluster.gpus": devices.gpus, "cluster.layout": layout, "learner.world_size": learners,
            "rollout.engines": engines, "rollout.tensor_parallel": parallel, "ppo.reward_workers": 1,
            "model.dtype": "bfloat16", "sft.batch_size": max(case.config.sft.batch_size, learners),
        }  # fmt: skip
        for stage, checkpointing, tokens in product((1, 2, 3), (False, True), MICRO_BATCHES):
            words = base | {
                "learner.zero_stage": stage, "learner.gradient_checkpointing": checkpointing,
                "learner.micro_batch_tokens": tokens, "learner.offload_optimizer": offload,
            }  # fmt: skip
            yield words | {"rollout.gpu_memory_utilization": _engine_share(apply(case, words))}


def _kinds(case: Case, devices: Devices) -> tuple[Literal["disaggregated", "colocated"], ...]:
    if case.config.ppo.staleness:
        return ("disaggregated",)
    return ("disaggregated", "colocated") if devices.gpus > 1 else ("colocated",)


def _learners(case: Case, devices: Devices) -> list[int]:
    """How many learners may share the GPUs: powers of two and whole nodes, and all."""
    powers = {2**power for power in range(12)}
    whole = {devices.a_node * count for count in range(1, devices.nodes + 1)}
    most = min(devices.gpus, case.config.learner.minibatch_size)
    return sorted(count for count in powers | whole | {devices.gpus} if count <= most)


def _engines(devices: Devices, learners: int, parallel: int, layout: str) -> int:
    """Engines on what the learners, and the reward workers' one GPU, leave; each within a node."""
    if layout == "colocated":
        return learners // parallel if learners == devices.gpus and devices.a_node % parallel == 0 else 0
    return min((devices.gpus - learners - 1) // parallel, devices.nodes * (devices.a_node // parallel))


def _engine_share(case: Case) -> float:
    """The share of a device for an engine: what the learner's states leave, in steps of 0.05, and not all."""
    assert case.device.memory_gib is not None
    if not case.config.shares_devices:
        return ENGINE_SHARE
    states = memory.resting(memory.learner_memory(case)) + sum(memory.reward_memory(case).values())
    left = HEADROOM - states / (case.device.memory_gib * GIB)
    return max(0.05, int(left * 20) / 20)


def _too_large(case: Case, devices: Devices) -> str:
    """What the smallest layout needs."""
    assert case.device.memory_gib is not None
    cases = [apply(case, words) for words in _layouts(case, devices, offload=True)]
    least = min((sum(memory.learner_memory(one).values()) for one in cases), default=0.0) / GIB
    reward = sum(memory.reward_memory(case).values()) / GIB
    room = HEADROOM * case.device.memory_gib
    return (
        f"{devices.gpus} x {case.device.title} cannot hold it: a learner needs {least:.0f} GiB at ZeRO-3 with "
        f"checkpointing and offloading, the reward model {reward:.0f} GiB on one GPU, of {room:.0f} GiB that an "
        "estimate may fill; give more or larger --gpus, a smaller --model, or a scorer elsewhere as reward.url"
    )
