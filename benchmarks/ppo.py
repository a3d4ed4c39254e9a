"""PPO's speed: beside other trainers, against what the machine can do, and against the size of a step.

    python benchmarks/ppo.py --workload w1 --json OUT        # beside OpenRLHF and TRL; about 15 minutes on 2 cores
    python benchmarks/ppo.py --workload w2 --json OUT        # 25M parameters: share of the machine's peak
    python benchmarks/ppo.py --workload scaling --json OUT   # samples, response length, engines, learners; and OUT.svg

`benchmarks/README.md` says how to read what they write. Everything runs on this machine, one thing after the other.
"""

import argparse
import importlib
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository: this file is run as a script

WORKLOADS = ("w1", "w2", "scaling")


def main() -> int:
    """Measure one workload and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--steps", type=int, default=20, help="w1: of each run (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="w1: each system so often, in turns (default: 3)")
    parser.add_argument("--only", nargs="+", default=[], metavar="SYSTEM", help="w1: these systems alone")
    parser.add_argument("--tiny", action="store_true", help="w2, scaling: a tiny model, to see that it works")
    args = parser.parse_args()
    workload = importlib.import_module(f"benchmarks.workloads.{args.workload}")
    workload.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
