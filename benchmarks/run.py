"""Run the quickstart over several seeds and compare its results with fixed limits.

    make bench                      # seeds 0 1 2: about 8 minutes each on 2 cores
    make bench ARGS="--seeds 0"

Writes `benchmarks/results/quickstart.json`: the report of each seed and the limits that it missed.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from metaalign_rl.core.arguments import path
from metaalign_rl.core.files import read_json, write_json

RESULTS = Path(__file__).parent / "results"
# Metric: (minimum, maximum). "a - b" is the difference of two metrics.
BARS: dict[str, tuple[float | None, float | None]] = {
    "reward.accuracy": (0.95, None),
    "reward.flip": (0.93, None),
    "reward.conflict": (0.93, None),
    "reward.on_policy": (0.93, None),
    "ppo.following": (0.90, None),
    "ppo.following - sft.following": (0.20, None),
    "ppo.conflict": (0.90, None),
    "ppo.distractor": (0.90, None),
    "ppo.following_greedy": (0.93, None),
    "ppo.following_greedy - sft.following_greedy": (0.05, None),
    "ppo.conflict_greedy - sft.conflict_greedy": (0.10, None),
    "ppo.distractor_greedy - sft.distractor_greedy": (0.0, None),
    "worst kind, sampled": (0.75, None),
    "ppo.gold_minus_proxy": (-0.05, 0.05),
    "ppo.mismatch_max": (None, 0.01),
    "seconds": (None, 480.0),
}


def main() -> int:
    """Run the seeds. Return 1 if any limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", type=path, default=RESULTS / "quickstart.json", help="the JSON file to write")
    args = parser.parse_args()
    runs = {}
    with tempfile.TemporaryDirectory() as root:
        for seed in args.seeds:
            runs[str(seed)] = run_seed(seed, Path(root))
            show(seed, runs[str(seed)])
            write_json(args.output, {"machine": machine(), "command": "make bench", "seeds": runs})
    return int(any(run["missed"] for run in runs.values()))


def run_seed(seed: int, root: Path) -> dict[str, object]:
    """Run the quickstart with one seed; return its report, its wall time and the limits that it missed."""
    began = time.monotonic()
    words = [f"run.seed={seed}", f"run.name=seed-{seed}", f"run.root={root}"]
    subprocess.run([sys.executable, "-m", "metaalign_rl", "run", "configs/quickstart.yaml", *words], check=True)
    seconds = time.monotonic() - began
    folder = root / f"seed-{seed}"
    report = read_json(folder / "report.json")
    kinds = read_json(folder / "evaluation" / "figures.json")["ppo_sampled"]["by"]["kind"]
    figures = report | {"seconds": seconds, "worst kind, sampled": min(k["following"] for k in kinds.values())}
    return {"figures": {name: round(value, 4) for name, value in figures.items()}, "missed": missed(figures)}


def missed(figures: dict[str, float]) -> list[str]:
    """Return the names of the limits that the metrics miss."""
    return [name for name, bar in BARS.items() if not _reached(_value(figures, name), bar)]


def show(seed: int, run: dict[str, object]) -> None:
    """Print each limit with the measured value."""
    figures = run["figures"]
    assert isinstance(figures, dict)
    for name, (least, most) in BARS.items():
        mark = "MISSED" if name in run["missed"] else "ok"  # type: ignore[operator]
        print(f"seed {seed}  {name:<48} {_value(figures, name):8.3f}  [{least}, {most}]  {mark}")


def machine() -> str:
    """Describe this machine."""
    cpus = len(os.sched_getaffinity(0))
    return f"{cpus} CPUs, {platform.machine()}, Python {platform.python_version()}"


def command() -> str:
    """Return the command that repeats this run from the repository's root."""
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def _value(figures: dict[str, float], name: str) -> float:
    one, _, other = name.partition(" - ")
    return figures[one] - (figures[other] if other else 0.0)


def _reached(value: float, bar: tuple[float | None, float | None]) -> bool:
    least, most = bar
    return (least is None or value >= least) and (most is None or value <= most)


if __name__ == "__main__":
    sys.exit(main())
