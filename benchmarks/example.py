"""Run `examples/ppo_loop.py` over several seeds: its results before and after PPO, and its time.

    python -m benchmarks.example            # seeds 0 1 2: about 2.5 minutes each on 2 cores

Writes `benchmarks/results/example.json`.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.about import RESULTS, command, machine
from metaalign_rl.core.arguments import path
from metaalign_rl.core.files import write_json

SCRIPT = Path(__file__).parents[1] / "examples" / "ppo_loop.py"


def main() -> None:
    """Run the seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", type=path, default=RESULTS / "example.json", help="the JSON file to write")
    args = parser.parse_args()
    runs = {}
    for seed in args.seeds:
        runs[str(seed)] = run_seed(seed)
        print(f"seed {seed}  {runs[str(seed)]}", flush=True)
        write_json(args.output, {"machine": machine(), "command": command(), "seeds": runs})


def run_seed(seed: int) -> dict[str, dict[str, float] | float]:
    """The table that the script prints, by row and column, and its wall time in seconds."""
    began = time.monotonic()
    words = [sys.executable, str(SCRIPT), "--seed", str(seed)]
    printed = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {**read_table(printed), "seconds": round(time.monotonic() - began, 1)}


def read_table(printed: str) -> dict[str, dict[str, float]]:
    """The rows `after SFT` and `after PPO` of the table in the script's output."""
    lines = [line.split() for line in printed.splitlines()]
    start = next(place for place, words in enumerate(lines) if words[:1] == ["mean"])
    columns = lines[start]
    return {
        " ".join(words[:2]): dict(zip(columns, map(float, words[2:]), strict=True))
        for words in lines[start + 1 : start + 3]
    }


if __name__ == "__main__":
    main()
