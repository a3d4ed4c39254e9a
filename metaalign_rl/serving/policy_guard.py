"""The guard in front of vLLM's server, which `metaalign-rl serve` adds with vLLM's option --middleware.

vLLM's own check of the API key covers the paths below /v1, /v2, /inference and /cohere only. `POST /invocations`, which
generates, and /tokenize, /scale_elastic_ep and others are open. This guard covers all paths but /health.
"""

import json
import os
from typing import Any

from metaalign_rl.core.http_guard import App, Guard

VARIABLE = "METAALIGN_POLICY_GUARD"  # the guard's settings as JSON: vLLM gives a middleware no arguments
NAME = f"{__name__}.PolicyGuard"
OPEN_PATHS = ("/health",)


class PolicyGuard(Guard):
    """A `Guard` with the settings that `settings` wrote into the environment. Without them, the server fails."""

    def __init__(self, app: App) -> None:
        super().__init__(app, open_paths=OPEN_PATHS, **json.loads(os.environ[VARIABLE]))


def settings(tokens: list[str], origins: list[str], *, local_only: bool) -> dict[str, str]:
    """The environment variable for `PolicyGuard`; the arguments are those of `Guard`."""
    values: dict[str, Any] = {"tokens": tokens, "origins": origins, "local_only": local_only}
    return {VARIABLE: json.dumps(values)}
