"""Prints a plan as tables or JSON."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from metaalign_rl.core.units import GIB, counted
from metaalign_rl.plan import layout, memory, stages, trainings
from metaalign_rl.plan.speed import rollout_seconds, step_seconds
from metaalign_rl.plan.work import Case, Settings

WIDTH = 110  # characters per line
OPEN = "Set these yourself: model.path and the learning rates."


def to_json(case: Case, settings: Settings) -> dict[str, Any]:
    """All numbers of a plan, as printed by `--json`: memory in GiB, times in seconds."""
    seconds = step_seconds(case)
    return {
        "device": {"name": case.device.name, "title": case.device.title, "measured": case.device.measured,
                   "source": case.device.source},
        "settings": settings,
        "parameters": case.policy.parameters,
        "answers": case.work.samples,
        "prompt_tokens": case.work.prompt_tokens,
        "answer_tokens": case.work.response_tokens,
        "memory_gib": {role: _gib(parts) for role, parts in stages.device_memory(case).items()},
        "host_gib": {stage: _gib(parts) for stage, parts in stages.host_memory(case).items()},
        "disk_gib": _gib(memory.disk_bytes(case)),
        "kv_cache_tokens": memory.kv_tokens(case),
        "seconds": seconds | {f"rollout/{part}": value for part, value in rollout_seconds(case).items()},
        "answers_per_second": case.work.samples / seconds["step"],
    }  # fmt: skip


def render(case: Case, settings: Settings) -> str:
    """The plan as text: layout, memory, time, the settings to change, and the source of the rates."""
    parts = [_headline(case), _layout(case), memory_table(case), _time(case), _settings(case, settings), _source(case)]
    return "\n\n".join(parts)


def _headline(case: Case) -> str:
    work, reward = case.work, case.reward
    scorer = f"a reward model of {_count(reward.backbone)}" if reward else "no reward model here"
    return (
        f"A policy of {_count(case.policy.parameters)} parameters in {case.dtype}, {scorer}. One step: "
        f"{work.samples} responses to {work.prompts} prompts,\nwith {work.prompt_tokens:.0f} + "
        f"{work.response_tokens:.0f} tokens on average."
    )


def _layout(case: Case) -> str:
    config, kind = case.config, "colocated" if case.config.shares_devices else "disaggregated"
    if case.device.is_cpu:
        where = f"{counted(config.cluster.cpus, 'CPU')}, used by all roles in turns"
    else:
        where = f"{config.cluster.gpus} x {case.device.title} on {counted(case.nodes, 'node')}, {kind}"
    rows = [
        ("learners", f"{config.learner.world_size}, ZeRO stage {config.learner.zero_stage}"),
        ("engines", f"{config.rollout.engines}, {counted(config.rollout.tensor_parallel, 'device')} each"),
        ("reward workers", str(config.ppo.reward_workers)),
    ]
    return f"Layout: {where}\n" + _table(rows)


def memory_table(case: Case) -> str:
    """Memory of one device by part and role, main memory and disk, as text."""
    roles = {role: _gib(parts) for role, parts in stages.device_memory(case).items()}
    parts = list(dict.fromkeys(part for found in roles.values() for part in found))
    rows = [["", *roles]] + [[part, *(_amount(found.get(part, 0.0)) for found in roles.values())] for part in parts]
    rows.append(["total", *(_amount(sum(found.values())) for found in roles.values())])
    unit = "process" if case.device.is_cpu else f"device of {case.device.memory_gib:g} GiB"
    hosts = stages.host_memory(case)
    totals = {f"Main memory of all nodes, stage {stage}": found for stage, found in hosts.items()}
    totals["Disk under the run's folder"] = memory.disk_bytes(case)
    sums = [f"{name}, GiB: {_sum(_gib(values))}" for name, values in totals.items()]
    return "\n".join([f"Estimated memory of each {unit}, in GiB:", _table(rows, right=1), *sums])


def _sum(parts: Mapping[str, float]) -> str:
    named = ", ".join(f"{name} {_amount(value)}" for name, value in parts.items())
    return f"{_amount(sum(parts.values()))} ({named})"


def _amount(gib: float) -> str:
    if gib >= 100:
        return f"{gib:.0f}"
    if gib >= 1:
        return f"{gib:.1f}"
    if gib >= 0.005:
        return f"{gib:.2f}"
    return "<0.01" if gib else "-"


def _time(case: Case) -> str:
    seconds, rollout = step_seconds(case), rollout_seconds(case)
    notes = {
        "rollout": ", ".join(f"{part} {value:.3g}" for part, value in rollout.items()),
        "reward": "during the rollout, on the same CPUs"
        if case.device.is_cpu
        else "time beyond the rollout; all workers share one GPU",
        "reference": "log-probabilities and values of the responses",
        "learn": f"epochs: {case.config.learner.epochs}",
        "transfer": "weight sync to the engines",
        "step": f"{case.work.samples / seconds['step']:.3g} responses per second",
    }
    rows = [(part, f"{value:.3g}", f"{value / seconds['step']:.0%}", notes[part]) for part, value in seconds.items()]
    return "Estimated seconds per step:\n" + _table(rows)


def _settings(case: Case, settings: Settings) -> str:
    """The settings that differ from the config, and those that the plan does not cover."""
    if not settings:
        return "The config has all of these settings already."
    words = " ".join(f"{key}={_value(value)}" for key, value in settings.items())
    lines = ["To use this layout, add to `metaalign-rl run CONFIG`:", *wrap(words, WIDTH, break_on_hyphens=False)]
    if case.device.is_cpu:
        return "\n  ".join(lines)
    notes = ("\n".join(wrap(text, WIDTH)) for text in trainings.problems(case, layout.MAX_FILL))
    return "\n\n".join(["\n  ".join(lines), *notes, OPEN])


def _source(case: Case) -> str:
    how = "measured on a CPU" if case.device.measured else "not measured on this kind of device"
    text = f"All numbers are estimates. Their rates are {how}: {case.device.source}."
    more = "docs/plan.md explains how they are made, and compares them with measurements on CPUs."
    return "\n".join([*wrap(text, WIDTH + 2), more])


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _gib(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: value / GIB for name, value in parts.items()}


def _count(parameters: float) -> str:
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"


def _table(rows: Sequence[Sequence[str]], right: int = 99) -> str:
    """The rows as a table. Columns from `right` on are aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(
            text.rjust(width) if column >= right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(f"  {line}".rstrip() for line in lines)
