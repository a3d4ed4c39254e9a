"""A lock on a run's folder: one driver at a time."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from metaalign_rl.core.errors import UserError

# Seconds: time for a driver to save and stop after a signal, and for the storage to release the lock of a lost machine.
TIMEOUT = 180.0
POLL_INTERVAL = 0.2


@contextmanager
def run_lock(folder: Path, timeout: float = TIMEOUT) -> Iterator[None]:
    """Lock a run's folder against other drivers. The operating system releases the lock when this process ends.

    Args:
        timeout: seconds to wait for another driver.

    Raises:
        UserError: another driver still has the lock after `timeout`, or the storage does not support file locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".driver"
    with path.open("ab+") as file:
        if not _lock(file):
            print(f"{folder}: {_holder(file)} works on this run; waiting {timeout:.0f} s for it to end", flush=True)
            end = time.monotonic() + timeout
            while not _lock(file):
                if time.monotonic() > end:
                    raise UserError(
                        f"{folder}: {_holder(file)} works on this run; wait for it, stop it, or give another run.name"
                    )
                time.sleep(POLL_INTERVAL)
        _write_holder(file)
        yield


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{file.name}: the storage does not support file locks ({error.strerror}), which keep a second driver off "
            "the run; give a run.root where `flock` works, such as a local disk, NFS 4 or Lustre mounted with -o flock"
        ) from error
    return True


def _write_holder(file: BinaryIO) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode())
    file.flush()


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    try:
        by = json.loads(file.read())
        return f"another driver (process {by['pid']} on {by['host']}, since {by['since']})"
    except ValueError:  # it has just taken the lock and not written its name yet
        return "another driver"
