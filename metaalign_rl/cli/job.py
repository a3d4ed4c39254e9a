"""Start the scripts in jobs/."""

from metaalign_rl.runtime.safe_path import leave_script_folder


def run_stages(*names: str) -> int:
    """Run the pipeline, or only the named stages; return the exit status."""
    leave_script_folder()
    from metaalign_rl.cli.main import job

    return job(list(names) or None)
