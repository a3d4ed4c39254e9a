"""Where the ranks of one training meet."""

import uuid

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config


def rendezvous(config: Config) -> str:
    """torch's `init_method` for a new group of ranks: a new file in the run's folder.

    In a file, because torch's TCP store listens on all interfaces; in the run's folder, because every node sees it.
    The storage must support file locks (`flock`), which NFS does from version 4 on. The files of the run's earlier
    groups are removed: one group trains at a time.
    """
    folder = RunFolder.of(config).checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("ranks-*"):
        stale.unlink()
    return f"file://{folder}/ranks-{uuid.uuid4().hex}"
