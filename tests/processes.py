"""The processes of a run, as seen from outside."""

import os
from contextlib import suppress
from pathlib import Path

import psutil


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants, and the Ray workers that `startup/fork_server.py` runs for them."""
    root = psutil.Process(pid)
    processes = [root, *root.children(recursive=True)]
    for process in list(processes):
        with suppress(psutil.NoSuchProcess):
            if worker := worker_of(process):
                processes += [worker, *worker.children(recursive=True)]
    return processes


def worker_of(process: psutil.Process) -> psutil.Process | None:
    """The process that runs a Ray worker in place of this one, if there is one.

    The system reuses process numbers, so the file of an earlier worker proves nothing.
    """
    file = Path(os.environ["FORK_SERVER"]).with_name(str(process.pid))
    if not runs(process, "setup_worker.py") or not file.is_file():
        return None
    worker = psutil.Process(int(file.read_text()))
    return worker if runs(psutil.Process(worker.ppid()), "fork_server.py") else None


def runs(process: psutil.Process, program: str) -> bool:
    """Whether a program's name is on the process's command line."""
    return any(word.endswith(program) for word in process.cmdline())
