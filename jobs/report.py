"""Run the stage `report`: python jobs/report.py --config FILE run.root=DIR [key=value …]"""

import sys

from metaalign_rl.cli.job import run_stages

if __name__ == "__main__":
    sys.exit(run_stages("report"))
