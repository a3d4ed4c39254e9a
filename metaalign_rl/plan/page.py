"""A plan as tables for reading."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from metaalign_rl.core.units import GIB
from metaalign_rl.plan import memory
from metaalign_rl.plan.layout import Words
from metaalign_rl.plan.memory import Memory
from metaalign_rl.plan.speed import rollout_seconds, step_seconds
from metaalign_rl.plan.work import Case

WIDTH = 110  # of the lines
OPEN = (
    "\n\nOnly the stage ppo is planned. Yours to set are model.path and the learning rates, and for the\n"
    "stages sft and reward their zero_stage and reward.devices."
)


def figures(case: Case, words: Words) -> dict[str, Any]:
    """All figures of a plan, as `--json` writes them: memory in GiB, times in seconds."""
    seconds = step_seconds(case)
    return {
        "device": {"name": case.device.name, "title": case.device.title, "measured": case.device.measured,
                   "source": case.device.source},
        "settings": words,
        "parameters": case.policy.parameters,
        "answers": case.work.samples,
        "prompt_tokens": case.work.prompt_tokens,
        "answer_tokens": case.work.answer_tokens,
        "memory_gib": {role: _gib(parts) for role, parts in device_memory(case).items()},
        "host_gib": _gib(memory.host_memory(case)),
        "disk_gib": _gib(memory.disk(case)),
        "kv_cache_tokens": memory.kv_tokens(case),
        "seconds": seconds | {f"rollout/{part}": value for part, value in rollout_seconds(case).items()},
        "answers_per_second": case.work.samples / seconds["step"],
    }  # fmt: skip


def device_memory(case: Case) -> dict[str, Memory]:
    """Bytes by part of each role's device."""
    return {
        "learner": memory.learner_memory(case),
        "engine": memory.engine_memory(case),
        "reward worker": memory.reward_memory(case),
    }


def render(case: Case, words: Words) -> str:
    """The plan for reading: layout, memory, time, the settings to change, and how far to trust it all."""
    parts = [_headline(case), _layout(case), memory_table(case), _time(case), _settings(case, words), _trust(case)]
    return "\n\n".join(parts)


def _headline(case: Case) -> str:
    work, reward = case.work, case.reward
    scorer = f"a reward model of {_count(reward.backbone)}" if reward else "no reward model here"
    return (
        f"A policy of {_count(case.policy.parameters)} parameters in {case.dtype}, {scorer}. A step: "
        f"{work.samples} answers to {work.prompts} prompts,\n{work.prompt_tokens:.0f} + {work.answer_tokens:.0f} "
        "tokens each in the mean."
    )


def _layout(case: Case) -> str:
    config, kind = case.config, "colocated" if case.config.shares_devices else "disaggregated"
    where = f"{config.cluster.cpus} CPUs, taken in turns" if case.device.is_cpu else (
        f"{config.cluster.gpus} x {case.device.title} on {case.nodes} node{'' if case.nodes == 1 else 's'}, {kind}"
    )  # fmt: skip
    engines = f"{config.rollout.engines} of {config.rollout.tensor_parallel} device" + "s" * (
        config.rollout.tensor_parallel > 1
    )
    rows = [("learners", f"{config.learner.world_size}, ZeRO stage {config.learner.zero_stage}"), ("engines", engines),
            ("reward workers", str(config.ppo.reward_workers))]  # fmt: skip
    return f"Layout: {where}\n" + _table(rows)


def memory_table(case: Case) -> str:
    """Memory a device by part and role, main memory and disk."""
    roles = {role: _gib(parts) for role, parts in device_memory(case).items()}
    parts = list(dict.fromkeys(part for found in roles.values() for part in found))
    rows = [["", *roles]] + [[part, *(_amount(found.get(part, 0.0)) for found in roles.values())] for part in parts]
    rows.append(["total", *(_amount(sum(found.values())) for found in roles.values())])
    unit = "process" if case.device.is_cpu else f"device of {case.device.memory_gib:g} GiB"
    found = {"Main memory of all nodes": memory.host_memory(case), "Disk under the run's folder": memory.disk(case)}
    sums = [f"{name}, GiB: {_sum(_gib(values))}" for name, values in found.items()]
    return "\n".join([f"Memory of each {unit}, in GiB, by estimate:", _table(rows, right=1), *sums])


def _sum(parts: Mapping[str, float]) -> str:
    named = ", ".join(f"{name} {_amount(value)}" for name, value in parts.items())
    return f"{_amount(sum(parts.values()))} ({named})"


def _amount(gib: float) -> str:
    return (
        f"{gib:.0f}"
        if gib >= 100
        else f"{gib:.1f}"
        if gib >= 1
        else f"{gib:.2f}"
        if gib >= 0.005
        else "<0.01"
        if gib
        else "-"
    )


def _time(case: Case) -> str:
    seconds, rollout = step_seconds(case), rollout_seconds(case)
    notes = {
        "rollout": ", ".join(f"{part} {value:.3g}" for part, value in rollout.items()),
        "reward": "beside the rollout, on the same CPUs"
        if case.device.is_cpu
        else "beyond the rollout: all workers share one GPU",
        "reference": "log-probabilities and values of the step's answers",
        "learn": f"passes over them: {case.config.learner.epochs}",
        "transfer": "new weights to the engines",
        "step": f"{case.work.samples / seconds['step']:.3g} answers a second",
    }
    rows = [(part, f"{value:.3g}", f"{value / seconds['step']:.0%}", notes[part]) for part, value in seconds.items()]
    return "Seconds of a step, by estimate:\n" + _table(rows)


def _settings(case: Case, words: Words) -> str:
    """The words that differ from what the config says already, and what they leave open."""
    if not words:
        return "The config says all of this already."
    lines = wrap(" ".join(f"{key}={_word(value)}" for key, value in words.items()), WIDTH, break_on_hyphens=False)
    return "\n  ".join(["To use it, behind `metaalign-rl run CONFIG`:", *lines]) + ("" if case.device.is_cpu else OPEN)


def _trust(case: Case) -> str:
    how = "measured on a CPU" if case.device.measured else "not measured on such a device"
    text = f"All of it is estimated, from rates {how}: {case.device.source}."
    more = "docs/plan.md says how the figures are made and how well they held where they could be checked."
    return "\n".join([*wrap(text, WIDTH + 2), more])


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _gib(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: value / GIB for name, value in parts.items()}


def _count(parameters: float) -> str:
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"


def _table(rows: Sequence[Sequence[str]], right: int = 99) -> str:
    """Rows in columns; those from `right` on end flush."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(
            text.rjust(width) if column >= right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(f"  {line}".rstrip() for line in lines)
