"""Runs a command and turns its exceptions into an exit status and a one-line error."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

from metaalign_rl.runtime.root_cause import root_cause
from metaalign_rl.runtime.signals import StopSignal

PATH_ERRORS = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


def guarded(action: Callable[[], int | None], resume: str) -> int:
    """Run `action` and return the exit status.

    The status is the action's result, or 0 if it has none; 2 after a user error; 130 after Ctrl-C; 143 after SIGTERM;
    1 after any other exception. A user error, or a path that cannot be read or written, prints one line. Any other
    exception prints its traceback, and its root cause on the last line.

    Args:
        resume: the command that resumes the action, printed after an interrupt; empty: there is none.
    """
    try:
        return action() or 0
    except KeyboardInterrupt as interrupt:
        hint = f"; to resume from the last checkpoint: {resume}" if resume else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 128 + (interrupt.number if isinstance(interrupt, StopSignal) else signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, PATH_ERRORS) and error.filename:
            print(f"error: {error.filename}: {error.strerror}; give another path", file=sys.stderr, flush=True)
            return 2
        root = root_cause(error)
        sys.stdout.flush()
        if not root.is_user_error:
            traceback.print_exc()
        print(f"error: {root.message if root.is_user_error else root}", file=sys.stderr, flush=True)
        return 2 if root.is_user_error else 1
