"""Where the ranks of one training meet."""

import os
import socket
import tempfile
import uuid

from metaalign_rl.config import Config


def rendezvous(config: Config) -> str:
    """torch's `init_method` for a new group of `config.learners` ranks.

    Ranks on this machine meet in a file: torch's TCP store would listen on all interfaces. Ranks on a cluster's nodes
    meet at a TCP port of the node where the driver runs.
    """
    if "RAY_ADDRESS" not in os.environ or config.learners == 1:
        return f"file://{tempfile.gettempdir()}/metaalign-ranks-{uuid.uuid4().hex}"
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
