"""Proposes the settings of SFT and of the reward model's training for a layout: the first that fit the devices."""

from collections.abc import Iterator
from itertools import product

from metaalign_rl.core.units import GIB
from metaalign_rl.plan.stages import estimated_stages, training_memory
from metaalign_rl.plan.work import Case, Settings, apply

_REMEDIES = {
    "sft": "Run it with more learners (learner.world_size) in a run of its own, or start from a checkpoint.",
    "reward": "Give a reward model as reward.path or reward.url, trained from a smaller model.",
}


def propose(case: Case, fill: float) -> Settings:
    """The settings that let both trainings fit: those of the config, or else the fastest that do.

    Where none fit, the settings that need the least memory; see `problems`.

    Args:
        fill: share of a device's memory that an estimate may fill.
    """
    found: Settings = {}
    for stage, settings in (("sft", _sft), ("reward", _reward)):
        if stage in estimated_stages(case.config):
            choices: list[Settings] = [{}, *settings(case)]
            needed = [training_memory(apply(case, words), stage) for words in choices]
            fitting = (index for index, size in enumerate(needed) if size <= _room(case, fill))
            found |= choices[next(fitting, needed.index(min(needed)))]
    return found


def problems(case: Case, fill: float) -> list[str]:
    """A sentence for each training that does not fit a device."""
    texts = []
    for stage in ("sft", "reward"):
        if stage in estimated_stages(case.config):
            needed, room = training_memory(case, stage), _room(case, fill)
            if needed > room:
                texts.append(
                    f"The stage {stage} does not fit: it needs {needed / GIB:.0f} GiB on each GPU, of "
                    f"{room / GIB:.0f} GiB that an estimate may fill, because its weights are not sharded. "
                    f"{_REMEDIES[stage]}"
                )
    return texts


def _room(case: Case, fill: float) -> float:
    assert case.device.memory_gib is not None
    return fill * case.device.memory_gib * GIB


def max_training_ranks(case: Case) -> int:
    """How many ranks can train together. Engines keep their GPUs, unless they share them with the learners."""
    config = case.config
    if config.shares_devices:
        return config.learner.world_size
    return max(1, config.cluster.gpus - config.rollout.engines * config.rollout.tensor_parallel)


def _sft(case: Case) -> Iterator[Settings]:
    ranks, rows = case.config.learner.world_size, case.config.sft.batch_size
    for checkpointing, passes in product((False, True), _divisors(rows // ranks)):
        yield {
            "sft.zero_stage": 2 if ranks > 1 else case.config.sft.zero_stage,
            "sft.gradient_checkpointing": checkpointing,
            "sft.gradient_accumulation": passes,
        }


def _reward(case: Case) -> Iterator[Settings]:
    rows, most = case.config.reward.batch_size, max_training_ranks(case)
    ranks = [count for count in _divisors(rows) if case.config.reward.devices <= count <= most]
    for devices, checkpointing in product(ranks, (False, True)):
        for passes in _divisors(rows // devices):
            yield {
                "reward.devices": devices,
                "reward.zero_stage": 2 if devices > 1 else case.config.reward.zero_stage,
                "reward.gradient_checkpointing": checkpointing,
                "reward.gradient_accumulation": passes,
            }


def _divisors(number: int) -> list[int]:
    return [count for count in range(1, number + 1) if number % count == 0]
