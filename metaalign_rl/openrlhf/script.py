"""Start jobs/openrlhf.py."""

from metaalign_rl.runtime.safe_path import leave_script_folder


def run_openrlhf() -> int:
    """Run PPO with OpenRLHF's trainer; return the exit status."""
    leave_script_folder()
    from metaalign_rl.openrlhf.job import main

    return main()
