"""`metaalign-reward serve`: runs the app under uvicorn."""

import os
from dataclasses import replace

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.http_guard import UVICORN
from metaalign_rl.core.net import is_loopback, listen, url_of
from reward.scorer import Scorer
from reward.serving.app import ServingConfig, create_app
from reward.serving.client import TOKEN_VARIABLE

DRAIN_SECONDS = 60  # that open requests have after SIGTERM


def require_token(host: str) -> str:
    """The token in METAALIGN_REWARD_TOKEN. It may be empty only on a loopback address.

    Raises:
        UserError: other machines can reach `host`, and there is no token.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token and not is_loopback(host):
        raise UserError(
            f"--host {host}: others could use the server; set {TOKEN_VARIABLE} to a secret that clients must send, "
            "or listen on 127.0.0.1"
        )
    return token


def serve(scorer: Scorer, config: ServingConfig, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C. Then accept no new requests and answer the open ones.

    Raises:
        UserError: the address is taken, or is not this machine's.
    """
    import uvicorn

    config = replace(config, local_only=is_loopback(host) and not config.token)
    app, socket = create_app(scorer, config), listen(host, port)
    print(f"scoring with {config.name!r} on {url_of(host, port)} (Ctrl-C to stop)", flush=True)
    server = uvicorn.Config(app, **UVICORN, timeout_graceful_shutdown=DRAIN_SECONDS)
    uvicorn.Server(server).run(sockets=[socket])
