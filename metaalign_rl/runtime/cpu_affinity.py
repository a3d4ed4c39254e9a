"""CPUs of an actor's own (`cluster.pin`)."""

import os

VARIABLE = "METAALIGN_PIN"


def request(index: int, threads: int) -> dict[str, str]:
    """What asks actor number `index` of its role, in its environment, to keep to `threads` CPUs of its own."""
    return {VARIABLE: f"{index} {threads}"}


def pin() -> None:
    """Keep this process, with all its threads, to the CPUs that its environment asks for, if it does; Linux alone."""
    if VARIABLE not in os.environ or not hasattr(os, "sched_setaffinity"):
        return
    index, threads = map(int, os.environ[VARIABLE].split())
    cpus = sorted(os.sched_getaffinity(0))
    own = {cpus[place % len(cpus)] for place in range(index * threads, (index + 1) * threads)}
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), own)
