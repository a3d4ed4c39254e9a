"""One driver at a time works on a run's folder."""

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

PATIENCE = 180.0  # seconds that a driver which was told to stop, or a lock of a machine that is gone, may take to end
INTERVAL = 0.2


@contextmanager
def run_lock(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Keep other drivers off a run's folder; the system lifts the lock however this process ends.

    Raises:
        UserError: another driver still works on it after `patience` seconds, or the storage has no file locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".driver"
    with path.open("ab+") as file:
        if not _lock(file):
            print(f"{folder}: {_holder(file)} works on this run; waiting {patience:.0f} s for it to end", flush=True)
            end = time.monotonic() + patience
            while not _lock(file):
                if time.monotonic() > end:
                    raise UserError(
                        f"{folder}: {_holder(file)} works on this run; wait for it, stop it, or give another run.name"
                    )
                time.sleep(INTERVAL)
        _sign(file)
        yield


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{file.name}: the storage does not lock files ({error.strerror}), which keeps two drivers off one run; "
            "give a run.root where `flock` works, such as a local disk, NFS 4 or Lustre mounted with -o flock"
        ) from error
    return True


def _sign(file: BinaryIO) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode())
    file.flush()


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    try:
        by = json.loads(file.read())
        return f"another driver (process {by['pid']} on {by['host']}, since {by['since']})"
    except ValueError:  # it has the lock and has not signed yet
        return "another driver"
