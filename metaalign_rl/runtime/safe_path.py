"""Keep the folder of a script off Python's path. Imports only the standard library."""

import os
import sys


def leave_script_folder() -> None:
    """Restart Python with `-P`, which keeps a script's folder off the path.

    For `python jobs/ppo.py`, Python puts jobs/ first on the path. There jobs/reward.py would hide the package `reward`,
    and jobs/openrlhf.py would hide OpenRLHF. The process keeps its id and its arguments.
    """
    if not sys.flags.safe_path:
        os.execv(sys.executable, [sys.executable, "-P", *sys.orig_argv[1:]])
