"""Python imports this file when a process of the tests starts. It makes importing torch, vLLM and others faster.

Most of the CPU time of the tests goes into such imports. Ray's workers skip most of them: see
`fork_server.py`.
"""

import gc
import importlib.metadata
import json
import os
import sys
from pathlib import Path

# By default Python searches for garbage among all imported objects after every 700 new ones.
gc.set_threshold(100_000, 20, 20)


def packages_distributions() -> dict[str, list[str]]:
    """The distributions of each package. transformers asks for it; computing it takes half a second."""
    found: dict[str, list[str]] = json.loads(Path(os.environ["TEST_PACKAGES"]).read_text())
    return found


if "TEST_PACKAGES" in os.environ:
    importlib.metadata.packages_distributions = packages_distributions

if "FORK_SERVER" in os.environ and any(word.endswith("setup_worker.py") for word in sys.orig_argv):
    import fork_server

    fork_server.hand_over(os.environ["FORK_SERVER"])
