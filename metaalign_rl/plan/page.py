"""A plan as tables for reading."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metaalign_rl.plan import memory
from metaalign_rl.plan.layout import Words, is_shared
from metaalign_rl.plan.memory import GIB, Memory
from metaalign_rl.plan.speed import rollout_seconds, step_seconds
from metaalign_rl.plan.work import Case


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
    """The plan for reading: layout, memory, time, and how far to trust them."""
    parts = [_headline(case), _layout(case), memory_table(case), _time(case), _settings(words), _trust(case)]
    return "\n\n".join(parts)


def _headline(case: Case) -> str:
    work, reward = case.work, case.reward
    scorer = f"a reward model of {_count(reward.backbone)}" if reward else "no reward model here"
    return (
        f"A policy of {_count(case.policy.parameters)} parameters in {case.dtype}, {scorer}. A step: "
        f"{work.samples} answers to {work.prompts} prompts,\n{work.prompt_tokens:.0f} + {work.answer_tokens:.0f} "
        "tokens each (as long as the config allows, unless --prompt-tokens and --answer-tokens say otherwise)."
    )


def _layout(case: Case) -> str:
    config, kind = case.config, "colocated" if is_shared(case.config) else "apart"
    where = f"{config.cluster.cpus} CPUs, taken in turns" if case.device.is_cpu else (
        f"{config.cluster.gpus} x {case.device.title} on {case.nodes} node{'' if case.nodes == 1 else 's'}, {kind}"
    )  # fmt: skip
    engines = f"{config.rollout.engines} of {config.rollout.tensor_parallel} device" + "s" * (
        config.rollout.tensor_parallel > 1
    )
    rows = [("learners", f"{config.learners}, ZeRO stage {config.learner.zero_stage}"), ("engines", engines),
            ("reward workers", str(config.ppo.reward_workers))]  # fmt: skip
    return f"Layout: {where}\n" + _table(rows)


def memory_table(case: Case) -> str:
    """Memory a device by role and part, main memory and disk."""
    roles = {role: _gib(parts) for role, parts in device_memory(case).items()}
    rows = [(role, _parts(parts), f"{sum(parts.values()):.1f}") for role, parts in roles.items()]
    for name, parts in (("main memory", _gib(memory.host_memory(case))), ("disk", _gib(memory.disk(case)))):
        rows.append((f"{name}, in all", _parts(parts), f"{sum(parts.values()):.1f}"))
    unit = "a process" if case.device.is_cpu else f"a device of {case.device.memory_gib:g}"
    return f"Memory, GiB {unit}, by estimate:\n" + _table(rows)


def _time(case: Case) -> str:
    seconds, rollout = step_seconds(case), rollout_seconds(case)
    notes = {
        "rollout": ", ".join(f"{part} {value:.3g}" for part, value in rollout.items()),
        "reward": "all of it" if case.device.is_cpu else "beyond the rollout, beside which it goes on",
        "reference": "log-probabilities and values of the step's answers",
        "learn": f"{case.config.learner.epochs} epochs",
        "transfer": "new weights to the engines",
        "step": f"{case.work.samples / seconds['step']:.3g} answers a second",
    }
    rows = [(part, f"{value:.3g}", f"{value / seconds['step']:.0%}", notes[part]) for part, value in seconds.items()]
    return "Seconds of a step, by estimate:\n" + _table(rows)


def _settings(words: Words) -> str:
    return "To use it, behind `metaalign-rl run CONFIG`:\n  " + " ".join(
        f"{key}={_word(value)}" for key, value in words.items()
    )


def _trust(case: Case) -> str:
    how = "measured on a CPU" if case.device.measured else "not measured on such a device"
    return (
        f"All of it is estimated, from rates {how} ({case.device.source}).\n"
        "docs/plan.md says how the figures are made and how well they held where they could be checked."
    )


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _gib(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: value / GIB for name, value in parts.items()}


def _parts(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.{1 if value >= 1 else 2}f}" for name, value in parts.items() if value >= 0.005)


def _count(parameters: float) -> str:
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"


def _table(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
