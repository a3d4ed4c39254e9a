"""ASGI middleware: the metrics of requests."""

import time
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward.serving.server_metrics import ServerMetrics

CLIENT_LEFT = 499  # the status of a request whose client left before its reply, as in nginx


class RequestMetrics:
    """Reports each request to the server's metrics.

    Args:
        paths: those of the app. All others count as one, so that clients cannot create new time series.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), CLIENT_LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"] if scope["path"] in self._paths else "none"
            self._metrics.answered(path, status, time.monotonic() - began)
