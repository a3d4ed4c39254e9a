"""PPO by OpenRLHF's own trainer: python jobs/openrlhf.py --config FILE [key=value …] [-- OPTIONS OF OPENRLHF]"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not jobs/: this file would hide the package

from metaalign_rl.openrlhf.job import main

if __name__ == "__main__":
    sys.exit(main())
