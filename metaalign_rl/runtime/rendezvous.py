"""The rendezvous file through which the ranks of one process group find each other."""

import uuid

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config


def rendezvous(config: Config) -> str:
    """torch's `init_method` for a new process group: the URL of a new file in the run's folder.

    It is a file because torch's TCP store listens on all interfaces. It is in the run's folder because every node sees
    that folder. The storage must support file locks (`flock`), as NFS does since version 4. One group trains at a time,
    so the files of earlier groups are deleted.
    """
    folder = RunFolder.of(config).checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("ranks-*"):
        stale.unlink()
    return f"file://{folder}/ranks-{uuid.uuid4().hex}"
