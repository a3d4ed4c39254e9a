"""What every benchmark records: where results are, this machine, and the command that measured them."""

import os
import platform
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Describe this machine."""
    cpus = len(os.sched_getaffinity(0))
    return f"{cpus} CPUs, {platform.machine()}, Python {platform.python_version()}"


def command() -> str:
    """Return the command that repeats this run from the repository's root."""
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
