"""Stops a run on Ctrl-C, or on the SIGTERM of `ray job stop`, Kubernetes and `kill`. Imports no heavy packages."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from metaalign_rl.runtime.ray_session import is_submitted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"  # Ray reads it in the environment of the head node
STOP_WAIT_DEFAULT = 3.0  # seconds


class StopSignal(KeyboardInterrupt):
    """A signal to stop arrived.

    Attributes:
        number: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_is_deferred = False
_pending: StopSignal | None = None


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """A context in which a signal to stop raises `StopSignal`: immediately, or at the end of `defer_signals`.

    A second signal is not deferred: Ctrl-C interrupts, and SIGTERM ends the process. Use it in the main thread and
    after `ray.init`, which installs its own handler.
    """
    global _pending
    before = [signal.signal(number, _receive) for number in SIGNALS]
    try:
        yield
    finally:
        _pending = None
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Run the block to its end, or to its exception, before a signal to stop raises `StopSignal`."""
    global _is_deferred
    _is_deferred = True
    try:
        yield
    finally:
        _is_deferred = False
        if _pending is not None:
            raise _pending


def warn_if_stop_kills_save(seconds: float) -> bool:
    """Print a warning if `ray job stop` would kill this job before a checkpoint is saved.

    Args:
        seconds: the duration of a save.

    Returns:
        Whether it has printed the warning.
    """
    wait = float(os.environ.get(STOP_WAIT_VARIABLE, STOP_WAIT_DEFAULT))
    is_short = is_submitted() and seconds > wait
    if is_short:
        text = (
            f"warning: saving a checkpoint takes {seconds:.0f} s, but `ray job stop` kills the job after {wait:g} s, "
            "which would lose the steps since the last checkpoint; set "
            f"{STOP_WAIT_VARIABLE}={4 * seconds:.0f} where the cluster's head node starts"
        )
        print(text, file=sys.stderr, flush=True)
    return is_short


def _receive(number: int, frame: FrameType | None) -> None:
    global _pending
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not _is_deferred:
        raise StopSignal(number)
    _pending = StopSignal(number)
    print("stopping after this step; a second signal stops immediately", file=sys.stderr, flush=True)
