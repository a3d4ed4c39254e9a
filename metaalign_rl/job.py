"""Start the scripts under jobs/. Imports nothing of `reward` until jobs/ is off Python's path."""

import os
import sys


def run_stages(*names: str) -> int:
    """Run the pipeline, or only the named stages; return the exit status."""
    _leave_script_folder()
    from metaalign_rl.cli import job

    return job(list(names) or None)


def run_openrlhf() -> int:
    """Run PPO by OpenRLHF's trainer; return the exit status."""
    _leave_script_folder()
    from metaalign_rl.openrlhf_job import main

    return main()


def _leave_script_folder() -> None:
    """Restart Python with `-P`, which keeps a script's folder off the path.

    Python puts jobs/ first on the path of `python jobs/ppo.py`. There jobs/reward.py hides the package `reward`, and
    jobs/openrlhf.py hides OpenRLHF. The process keeps its id and its arguments.
    """
    if not sys.flags.safe_path:
        os.execv(sys.executable, [sys.executable, "-P", *sys.orig_argv[1:]])
