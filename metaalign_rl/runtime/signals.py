"""Being asked to stop: by Ctrl-C, or by the SIGTERM of `ray job stop`, Kubernetes and `kill`. Light."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from metaalign_rl.runtime.ray_session import is_submitted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"  # Ray's; read in the environment of the cluster's head
WAIT_DEFAULT = 3.0


class Stop(KeyboardInterrupt):
    """A signal to stop; its `number` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_is_held = False
_waiting: Stop | None = None


@contextmanager
def on_signals() -> Iterator[None]:
    """Inside, a signal to stop raises `Stop`, at once or at the end of what is `held`.

    A second signal is not held back: Ctrl-C interrupts, SIGTERM ends the process. To be used in the main thread, after
    `ray.init`, which sets a handler of its own.
    """
    global _waiting
    before = [signal.signal(one, _receive) for one in SIGNALS]
    try:
        yield
    finally:
        _waiting = None
        for one, handler in zip(SIGNALS, before, strict=True):
            signal.signal(one, handler)


@contextmanager
def held() -> Iterator[None]:
    """Hold a signal back: what has begun inside is finished, or fails, first."""
    global _is_held
    _is_held = True
    try:
        yield
    finally:
        _is_held = False
        if _waiting is not None:
            raise _waiting


def warn_of_wait(seconds: float) -> bool:
    """Say that saving a checkpoint takes longer than `ray job stop` waits, where that is so."""
    wait = float(os.environ.get(WAIT_VARIABLE, WAIT_DEFAULT))
    is_short = is_submitted() and seconds > wait
    if is_short:
        text = (
            f"warning: a checkpoint takes {seconds:.0f} s to write and `ray job stop` kills after {wait:g} s: a stop "
            f"would lose the steps since the last one. Set {WAIT_VARIABLE}={4 * seconds:.0f} where the cluster's head "
            "starts"
        )
        print(text, file=sys.stderr, flush=True)
    return is_short


def _receive(number: int, frame: FrameType | None) -> None:
    global _waiting
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not _is_held:
        raise Stop(number)
    _waiting = Stop(number)
    print("stopping after the step under way; again: at once", file=sys.stderr, flush=True)
