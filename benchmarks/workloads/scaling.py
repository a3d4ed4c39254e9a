"""Measure the time of a step by samples, answer length, engines and learners, one axis at a time."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.about import command
from benchmarks.drawing import Panel, drawing
from benchmarks.workloads import toy
from benchmarks.workloads.common import machine, parts_of, train, write_config
from metaalign_rl.core.files import write_json, write_text

SHAPE = toy.Shape(hidden=128, layers=4, wide=256)
CONTEXT = 256
AXES: dict[str, tuple[str, tuple[int, ...]]] = {  # name: the setting and its values
    "samples": ("ppo.prompts_per_step", (32, 64, 128, 256)),
    "response tokens": ("rollout.max_new_tokens", (16, 32, 64, 128)),
    "engines": ("rollout.engines", (1, 2)),
    "learners": ("learner.world_size", (1, 2)),
}
SETTINGS = {
    "rollout.engines": 1,
    "rollout.max_new_tokens": 32,
    "learner.world_size": 1,
    "learner.minibatch_size": 512,
    "ppo.prompts_per_step": 128,
    "ppo.samples_per_prompt": 1,
}
TINY = toy.Shape(hidden=64, layers=1, wide=64)
STEPS = 4  # per run; the first does not count


def run(args: argparse.Namespace) -> None:
    """Measure and write the results. The base settings, which are on every axis, are measured once."""
    measured: dict[tuple[str, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = toy.make(Path(folder), TINY if args.tiny else SHAPE, 256, CONTEXT)
        base = measure(Path(folder), made, "base", {})
        for name, (setting, values) in AXES.items():
            for value in values:
                same = SETTINGS[setting] == value
                run_name = f"{name.replace(' ', '-')}-{value}"
                measured[name, value] = base if same else measure(Path(folder), made, run_name, {setting: value})
                print(f"{name} {value}: {measured[name, value]['step_s_median']:.3f} s per step", flush=True)
    axes = {
        name: {
            "setting": setting,
            "measured": [{"value": value, **measured[name, value]} for value in values],
        }
        for name, (setting, values) in AXES.items()
    }
    write_json(args.json, {"command": command(), **machine(), "base": SETTINGS, "axes": axes})
    write_text(args.json.with_suffix(".svg"), drawing(panels(axes), "seconds per step"))


def measure(folder: Path, made: dict[str, Any], name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return a run's start-up, its median step and the parts of it."""
    own = {"run.name": name, "ppo.steps": STEPS, "ppo.save_steps": STEPS}
    write_config(folder / f"{name}.yaml", made | SETTINGS | own | changes)
    timing, lines = train(folder / f"{name}.yaml", folder / name)
    return {"startup_s": timing.startup_s, "step_s_median": timing.median, "parts": parts_of(lines)}


def panels(axes: dict[str, Any]) -> list[Panel]:
    """Make one panel per axis: the step and its largest parts, by value."""
    found = []
    for name, axis in axes.items():
        points = axis["measured"]
        lines = {"step": [(point["value"], point["step_s_median"]) for point in points]}
        for part in points[0]["parts"]:
            if part != "seconds_step" and max(point["parts"].get(part, 0) for point in points) > 0.02:
                label = part.removeprefix("seconds_")
                lines[label] = [(point["value"], point["parts"].get(part, 0.0)) for point in points]
        found.append(Panel(name, lines))
    return found
