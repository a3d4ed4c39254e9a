"""What happens to every request: its size is limited, and it is counted."""

import time

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward.serving.metrics import Metrics


class BodyLimit:
    """ASGI middleware: a request of more than `max_bytes` is answered with 413, and no more of it is read."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            return await JSONResponse({"detail": self._problem}, 413)(scope, receive, send)
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:  # one that did not say how long it is
                raise HTTPException(413, self._problem)
            return message

        await self._app(scope, limited, send)

    @property
    def _problem(self) -> str:
        return f"expected a request of at most {self._max_bytes} bytes; send the rows in several"


class Counting:
    """ASGI middleware: tells `metrics` of each answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "none")  # a path that is not ours must not make a new series
            self._metrics.answered(path, status, time.monotonic() - began)
