"""Run the quickstart over several seeds and compare its results with fixed limits.

    make bench                                # seeds 0 to 4, twice each; a run takes 5 to 12 minutes on 2 cores
    make bench ARGS="--seeds 0 --times 1"
    python -m benchmarks.quickstart --table   # the README's table from the results

Writes `benchmarks/results/quickstart.json`: the config, the report of each run, and the limits that it missed. If it is
interrupted, start it again: runs that are in the file are not repeated.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.about import RESULTS, machine
from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.core.arguments import path
from metaalign_rl.core.files import read_json, write_json

CONFIG = Path("configs/quickstart.yaml")
Figures = dict[str, float]
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
}
# The rows of the README's table, and their metrics after SFT and after PPO.
TABLE = {
    "mean over all relations, sampled at temperature 1": "following",
    "conflicts between the two tiers, sampled at temperature 1": "conflict",
    "mean over all relations, greedy": "following_greedy",
    "conflicts between the two tiers, greedy": "conflict_greedy",
}


def main() -> int:
    """Make the missing runs. Return 1 if any limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    parser.add_argument("--times", type=int, default=2, help="runs per seed: they differ, see README (default: 2)")
    parser.add_argument("--output", type=path, default=RESULTS / "quickstart.json", help="the JSON file to write")
    parser.add_argument(
        "--table", action="store_true", help="print the table of the results in OUTPUT, and run nothing"
    )
    args = parser.parse_args()
    if args.table:
        print(table(read_json(args.output)["runs"]))
        return 0
    results = begin(args.output)
    for seed in args.seeds * args.times:
        runs = results["runs"]
        if sum(run["seed"] == seed for run in runs) < args.times:
            runs.append(run_seed(seed))
            show(runs[-1])
            write_json(args.output, results)
    return int(any(run["missed"] for run in results["runs"]))


def begin(output: Path) -> dict[str, Any]:
    """Return the results in a file, or new ones without runs.

    Raises:
        SystemExit: the file has results of another config or machine.
    """
    new = {"machine": machine(), "command": "make bench", "config": loader.dump(loader.load(Config, CONFIG, []))}
    if not output.is_file():
        return {**new, "runs": []}
    found: dict[str, Any] = read_json(output)
    for name in ("machine", "config"):
        if found[name] != new[name]:
            raise SystemExit(f"{output}: has results of another {name}; give another --output, or remove the file")
    return found


def run_seed(seed: int) -> dict[str, Any]:
    """Run the quickstart with one seed; return its report, its wall time and the limits that it missed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        words = [f"run.seed={seed}", f"run.root={root}"]
        subprocess.run([sys.executable, "-m", "metaalign_rl", "run", str(CONFIG), *words], check=True)
        return {"seed": seed, **summary(Path(root) / "quickstart", time.monotonic() - began)}


def summary(folder: Path, seconds: float) -> dict[str, Any]:
    """Return the `figures` of a finished run, and the limits `missed`."""
    kinds = read_json(folder / "evaluation" / "figures.json")["ppo_sampled"]["by"]["kind"]
    figures = read_json(folder / "report.json")
    figures |= {"seconds": seconds, "worst kind, sampled": min(kind["following"] for kind in kinds.values())}
    return {"figures": {name: round(value, 4) for name, value in figures.items()}, "missed": missed(figures)}


def missed(figures: Figures) -> list[str]:
    """Return the names of the limits that the metrics miss."""
    return [name for name, bar in BARS.items() if not _reached(_value(figures, name), bar)]


def show(run: dict[str, Any]) -> None:
    """Print each limit with the measured value."""
    for name, (least, most) in BARS.items():
        mark = "MISSED" if name in run["missed"] else "ok"
        print(f"seed {run['seed']}  {name:<48} {_value(run['figures'], name):8.3f}  [{least}, {most}]  {mark}")
    print(f"seed {run['seed']}  {'seconds':<48} {run['figures']['seconds']:8.0f}", flush=True)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The README's table: means and standard deviations over the runs."""
    lines = ["| | after SFT | after PPO |", "|---|---|---|"]
    for meaning, name in TABLE.items():
        cells = (_mean([run["figures"][f"{stage}.{name}"] for run in runs]) for stage in ("sft", "ppo"))
        lines.append(f"| {meaning} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _value(figures: Figures, name: str) -> float:
    one, _, other = name.partition(" - ")
    return figures[one] - (figures[other] if other else 0.0)


def _reached(value: float, bar: tuple[float | None, float | None]) -> bool:
    least, most = bar
    return (least is None or value >= least) and (most is None or value <= most)


if __name__ == "__main__":
    sys.exit(main())
