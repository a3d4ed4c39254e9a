"""How a command ends: its exit status, and one line for a user's error."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

from metaalign_rl.runtime.root_cause import root_cause
from metaalign_rl.runtime.signals import Stop

PATH_ERRORS = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


def guarded(action: Callable[[], int | None], resume: str) -> int:
    """Run `action`; the exit status: its own, 2 after a user's error, 130 after Ctrl-C, 143 after SIGTERM, else 1.

    A user's error, or a path that cannot be read or written, is one line. Any other keeps its traceback, and the
    last line says what failed first.
    """
    try:
        return action() or 0
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted{'; to go on from the last checkpoint: ' if resume else ''}{resume}", file=sys.stderr)
        return 128 + (interrupt.number if isinstance(interrupt, Stop) else signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, `head` say, has read enough
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
