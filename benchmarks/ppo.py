"""Measure the speed of PPO on one workload.

    python -m benchmarks.ppo --workload w1 --json OUT        # compared with OpenRLHF and TRL; 15 minutes on 2 cores
    python -m benchmarks.ppo --workload w2 --json OUT        # 23M parameters: share of the machine's peak
    python -m benchmarks.ppo --workload scaling --json OUT   # samples, answer length, engines, learners; also OUT.svg

`benchmarks/README.md` explains the results. All runs are on this machine, one after the other.
"""

import argparse
import importlib
import sys

from metaalign_rl.core.arguments import path

WORKLOADS = ("w1", "w2", "scaling")


def main() -> int:
    """Measure one workload and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--json", type=path, required=True, help="the JSON file to write")
    parser.add_argument("--steps", type=int, default=20, help="w1: steps per run (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="w1: runs per system, in turns (default: 3)")
    parser.add_argument("--only", nargs="+", default=[], metavar="SYSTEM", help="w1: only these systems")
    parser.add_argument("--tiny", action="store_true", help="w2, scaling: a tiny model, to test the script")
    args = parser.parse_args()
    workload = importlib.import_module(f"benchmarks.workloads.{args.workload}")
    workload.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
