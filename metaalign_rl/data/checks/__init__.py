"""Gold checks: programs that decide whether an answer does what a tier asks. A row names its checks in `checks`.

`registry` holds the checks and runs them. The other modules register them, so importing this package registers all.
"""

from metaalign_rl.data.checks import verih, world  # noqa: F401  (registers their checks)
from metaalign_rl.data.checks.registry import run_check

__all__ = ["run_check"]
