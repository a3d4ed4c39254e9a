"""The processes of a run, as seen from outside."""

import os
from contextlib import suppress
from pathlib import Path

import psutil


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants. `startup/fork_server.py` runs Ray workers in other processes: they belong."""
    root = psutil.Process(pid)
    processes = [root, *root.children(recursive=True)]
    for process in list(processes):
        with suppress(psutil.NoSuchProcess):
            if worker := worker_of(process.pid):
                processes += [worker, *worker.children(recursive=True)]
    return processes


def worker_of(pid: int) -> psutil.Process | None:
    """The process that runs the Ray worker which was started as process `pid`, if it is another one."""
    file = Path(os.environ["FORK_SERVER"]).with_name(str(pid))
    return psutil.Process(int(file.read_text())) if file.is_file() else None
