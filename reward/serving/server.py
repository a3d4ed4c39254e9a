"""`metaalign-reward serve`: the app under uvicorn."""

import os

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.net import is_loopback, listen, url_of
from reward.scorer import Scorer
from reward.serving.app import Serving, create_app
from reward.serving.client import TOKEN_VARIABLE

DRAIN = 60  # seconds that requests under way have after SIGTERM


def require_token(host: str) -> str:
    """The token of METAALIGN_REWARD_TOKEN; empty is allowed on loopback alone.

    Raises:
        UserError: `host` can be reached from elsewhere, and there is no token.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token and not is_loopback(host):
        raise UserError(
            f"--host {host}: others could use the server; set {TOKEN_VARIABLE} to a secret that clients must send, "
            "or listen on 127.0.0.1"
        )
    return token


def serve(scorer: Scorer, serving: Serving, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; then take no new request and answer those under way.

    Raises:
        UserError: the address cannot be listened on.
    """
    import uvicorn

    app, socket = create_app(scorer, serving), listen(host, port)
    print(f"scoring with {serving.name!r} on {url_of(host, port)} (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=DRAIN)
    uvicorn.Server(config).run(sockets=[socket])
