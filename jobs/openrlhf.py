"""Run PPO by OpenRLHF's trainer: python jobs/openrlhf.py --config FILE [key=value …] [-- OPTIONS OF OPENRLHF]"""

import sys

from metaalign_rl.openrlhf.script import run_openrlhf

if __name__ == "__main__":
    sys.exit(run_openrlhf())
