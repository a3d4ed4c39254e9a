"""Kill processes of a PPO run at random and compare its metrics with those of an undisturbed run.

    python -m benchmarks.chaos --kills 20 --seed 0 --json OUT

Both runs have the same config in deterministic mode. In the second run `kill -9` hits a rollout engine, a reward
worker, a learner or the driver. The seed decides the times and the targets. After the driver is killed, the same
command runs again.

The metrics must be exactly equal, except the keys `seconds_*` and `*faults`, and each step must be there once. If not,
the exit status is 1. The results also have the kills and the faults that the run noticed.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.about import command
from benchmarks.workloads import toy
from benchmarks.workloads.common import environment, machine, run_command, train, write_config
from metaalign_rl.core.arguments import path
from metaalign_rl.core.files import read_jsonl, write_json

SHAPE = toy.Shape(hidden=64, layers=1, wide=128, words=200)
SETTINGS = {
    "model.max_tokens": 64,
    "rollout.engines": 2,
    "rollout.max_new_tokens": 16,
    "learner.learning_rate": 1e-3,
    "learner.minibatch_size": 16,
    "learner.zero_stage": 0,
    "ppo.deterministic": True,
    "ppo.prompts_per_step": 16,
    "ppo.samples_per_prompt": 2,
    "ppo.reward_workers": 2,
    "ppo.save_steps": 2,
}
TITLES = {"rollout engine": "ray::RolloutEngine", "reward worker": "ray::RewardWorker", "learner": "ray::Learner"}
TARGETS = (*TITLES, "driver")
QUIET = 6  # steps at the end without kills, so that no kill comes too late
SHOWN = 20  # differences in the results
TIMEOUT = 600.0  # seconds to wait for a step or a target


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill of process `who`, `delay` seconds after step `after` was first done."""

    who: str
    after: int
    delay: float


def main() -> int:
    """Do both runs and compare them. Return 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=path, required=True, help="the JSON file to write")
    parser.add_argument("--kills", type=int, default=20, help="default: 20")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times and the targets (default: 0)")
    args = parser.parse_args()
    steps = 2 * args.kills + QUIET
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = toy.make(folder, SHAPE, 64, 64) | SETTINGS | {"ppo.steps": steps}
        for run in ("undisturbed", "disturbed"):
            write_config(folder / f"{run}.yaml", made | {"run.name": run})
        calm, expected = train(folder / "undisturbed.yaml", folder / "undisturbed")
        print(f"undisturbed: {steps} steps of {calm.median:.2f} s", flush=True)
        disturbed = Disturbed(folder, args.seed)
        disturbed.run(plan(args.kills, steps, args.seed, calm.median))
        compared = compare(expected, disturbed.steps())
        faults = [line for _, line in read_jsonl(disturbed.faults)] if disturbed.faults.is_file() else []
    figures = {
        "command": command(),
        **machine(),
        "steps": steps,
        **compared,
        "kills": [asdict(kill) for kill in disturbed.done],
        "driver_starts": disturbed.starts,
        "faults_noticed": len(faults),
        "faults": faults,
    }
    write_json(args.json, figures)
    print(f"{len(disturbed.done)} kills, {len(faults)} faults noticed, {disturbed.starts} starts of the driver")
    print("metrics equal" if compared["equal"] else f"metrics DIFFER, for example {compared['differences'][:3]}")
    return 0 if compared["equal"] and len(disturbed.done) == args.kills else 1


def plan(kills: int, steps: int, seed: int, step_seconds: float) -> list[Kill]:
    """Return the kills in order. Some come while the run still recovers from the one before."""
    rng = random.Random(seed)
    moments = sorted(rng.randrange(1, steps - QUIET + 1) for _ in range(kills))
    return [Kill(rng.choice(TARGETS), after, rng.uniform(0, 2 * step_seconds)) for after in moments]


def compare(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Check that every step is there once and equal; list the differences."""
    differences = []
    for one, other in zip(expected, found, strict=False):
        for key in sorted(one.keys() | other.keys()):
            if not key.startswith("seconds_") and not key.endswith("faults") and one.get(key) != other.get(key):
                place = {"step": one.get("step"), "key": key}
                differences.append(place | {"undisturbed": one.get(key), "disturbed": other.get(key)})
    once = [line["step"] for line in found] == [line["step"] for line in expected]
    return {"equal": once and not differences, "each_step_once": once, "differences": differences[:SHOWN]}


class Disturbed:
    """The run whose processes are killed, over all starts of its driver.

    Attributes:
        done: the kills so far.
        starts: how often the driver was started.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._config, self._log = folder / "disturbed.yaml", folder / "disturbed.log"
        self._metrics, self.faults = folder / "disturbed" / "metrics.jsonl", folder / "disturbed" / "faults.jsonl"
        self._rng = random.Random(seed)  # chooses one of several engines, for example
        self.done: list[Kill] = []
        self.starts = 0

    def run(self, kills: list[Kill]) -> None:
        """Start the run, kill as planned, and wait for the end.

        Raises:
            SystemExit: the run ended too early, failed or hangs.
        """
        self._start()
        for kill in kills:
            self._wait(lambda kill=kill: self.count() >= kill.after)
            time.sleep(kill.delay)
            self._make(kill)
        if self._process.wait() != 0:
            self._give_up("the run failed")

    def steps(self) -> list[dict[str, Any]]:
        """Return the metrics of the finished run, one dict per step."""
        return [line for _, line in read_jsonl(self._metrics)]

    def count(self) -> int:
        """Count the steps written so far. The last line may be incomplete."""
        return self._metrics.read_bytes().count(b"\n") if self._metrics.is_file() else 0

    def _start(self) -> None:
        self.starts += 1
        with self._log.open("a") as log:
            words = run_command(self._config)
            self._process = subprocess.Popen(words, env=environment(), stdout=log, stderr=subprocess.STDOUT)

    def _make(self, kill: Kill) -> None:
        if kill.who == "driver":
            others = list(descendants(self._process.pid))
            self._process.kill()
            self._process.wait()
            self._wait(lambda: not any(map(_lives, others)), alive=False)  # Ray's processes end after the driver
            self._start()
        else:
            while not self._hit(TITLES[kill.who]):
                time.sleep(0.02)
        self.done.append(kill)
        print(f"kill {len(self.done)}: {kill.who}, after step {self.count()}", flush=True)

    def _hit(self, title: str) -> bool:
        """Kill one of the run's processes with this title; return whether one was found."""
        self._wait(lambda: bool(self._find(title)))
        try:
            os.kill(self._rng.choice(self._find(title)), signal.SIGKILL)
        except (ProcessLookupError, IndexError):  # it ended just before
            return False
        return True

    def _find(self, title: str) -> list[int]:
        return sorted(pid for pid in descendants(self._process.pid) if title in _title(pid))

    def _wait(self, condition: Callable[[], bool], alive: bool = True) -> None:
        end = time.monotonic() + TIMEOUT
        while not condition():
            if alive and self._process.poll() is not None:
                self._give_up(f"the run ended too early, exit {self._process.returncode}")
            if time.monotonic() > end:
                self._process.kill()
                self._give_up(f"no progress within {TIMEOUT:.0f} s")
            time.sleep(0.02)

    def _give_up(self, problem: str) -> None:
        sys.exit(f"{problem}, after {len(self.done)} kills and {self.count()} steps:\n"
                 f"{self._log.read_text()[-5000:]}")  # fmt: skip


def descendants(pid: int) -> Iterator[int]:
    """Yield the ids of a process's descendants, without those that have ended before they are read."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return
    for child in children:
        yield child
        yield from descendants(child)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
