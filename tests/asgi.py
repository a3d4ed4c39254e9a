"""Calls an ASGI app as a server does, one message at a time."""

import asyncio
from collections.abc import Iterable
from typing import Any

Headers = dict[str, str]


def scope_of(path: str, headers: Headers, method: str = "POST", kind: str = "http") -> dict[str, Any]:
    """The scope of a request."""
    pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": kind, "method": method, "path": path, "headers": pairs, "query_string": b"", "root_path": ""}


class Client:
    """A client of an app. It sends its body in parts and then stays, or leaves."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.parts_read = 0
        self.leave = asyncio.Event()
        self.sent: list[dict[str, Any]] = []

    async def send(
        self,
        path: str = "/",
        headers: Headers | None = None,
        parts: Iterable[bytes] = (b"",),
        method: str = "POST",
        kind: str = "http",
        stalls: bool = False,
    ) -> int | None:
        """The status of the reply; None if there was none. With `stalls`, the last part never comes."""
        body = list(parts)

        async def receive() -> dict[str, Any]:
            if self.parts_read < len(body) and not (stalls and self.parts_read == len(body) - 1):
                self.parts_read += 1
                more = self.parts_read < len(body)
                return {"type": "http.request", "body": body[self.parts_read - 1], "more_body": more}
            await self.leave.wait()
            return {"type": "http.disconnect"}

        async def reply(message: dict[str, Any]) -> None:
            self.sent.append(message)

        await self._app(scope_of(path, headers or {}, method, kind), receive, reply)
        return self.status

    @property
    def status(self) -> int | None:
        """The status of the reply so far."""
        return next((message["status"] for message in self.sent if message["type"] == "http.response.start"), None)

    @property
    def text(self) -> str:
        """The reply's body."""
        return b"".join(message.get("body", b"") for message in self.sent).decode()


class Echo:
    """An app that reads its body, waits if it is told to, and answers with the body's length."""

    def __init__(self, wait: float = 0.0) -> None:
        self.wait = wait
        self.bodies: list[bytes] = []
        self.cancelled = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.accept"})
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        try:
            await asyncio.sleep(self.wait)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(len(body)).encode()})
