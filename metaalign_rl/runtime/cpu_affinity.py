"""Pins actors to separate CPUs (`cluster.pin`)."""

import os

VARIABLE = "METAALIGN_PIN"


def pin_environment(index: int, threads: int) -> dict[str, str]:
    """The environment variable that makes `pin` give `threads` CPUs to the actor number `index` of its role."""
    return {VARIABLE: f"{index} {threads}"}


def pin() -> None:
    """Restrict all threads of this process to its own CPUs, if `pin_environment` is set. Linux only."""
    if VARIABLE not in os.environ or not hasattr(os, "sched_setaffinity"):
        return
    index, threads = map(int, os.environ[VARIABLE].split())
    cpus = sorted(os.sched_getaffinity(0))
    own = {cpus[number % len(cpus)] for number in range(index * threads, (index + 1) * threads)}
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), own)
