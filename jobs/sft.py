"""The stage `sft` alone: python jobs/sft.py --config FILE run.root=DIR [key=value …]"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not jobs/: its reward.py would hide the package

from metaalign_rl.cli.main import job

if __name__ == "__main__":
    sys.exit(job(["sft"]))
