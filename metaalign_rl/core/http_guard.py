"""ASGI middleware in front of every HTTP server of the project: who may send a request, and what its body may take.

It has no dependencies, so vLLM's server, the scorer and the chat page share it. A request costs nothing before its
headers are checked: no byte of its body is read.
"""

import asyncio
import base64
import binascii
import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from hashlib import sha256
from hmac import compare_digest
from typing import Any
from urllib.parse import urlsplit

from metaalign_rl.core.net import is_loopback_name
from metaalign_rl.core.request_bodies import BodyLimits, BodyReader, ClientLeft, Message, Receive, Refused, holding

Scope = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# For uvicorn: h11 limits the size of the headers (64 KiB), httptools does not; no server here has WebSockets.
UVICORN: dict[str, Any] = {"http": "h11", "ws": "none", "log_level": "warning"}


class Guard:
    """Checks each request's headers, then reads its body within limits, then calls the app.

    If the client closes the connection before its answer, the app's work on the request is cancelled.

    Args:
        tokens: a request must have one of them, as `Authorization: Bearer` or as the password of `Basic`. Without any,
            every request is allowed. WebSockets need the token too.
        open_paths: exact paths that need no token. Bodies sent to them are not read.
        local_only: the server has no token and listens on a loopback address. Then the headers Host and Origin must
            name this machine: a browser sends the requests of other sites' pages with other names.
        origins: origins of web pages that may send requests, such as `https://example.com`; `*` for all.
        limits: of bodies.
    """

    def __init__(
        self,
        app: App,
        *,
        tokens: Sequence[str] = (),
        open_paths: Collection[str] = (),
        local_only: bool = False,
        origins: Collection[str] = (),
        limits: BodyLimits | None = None,
    ) -> None:
        self._app, self._open_paths = app, frozenset(open_paths)
        self._digests = [sha256(token.encode()).digest() for token in tokens]
        self._local_only, self._origins = local_only, frozenset(origins)
        self._bodies = BodyReader(limits or BodyLimits())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = Headers(scope)
        try:
            needs_no_token = self._is_open(scope, headers)
            self._check(headers, needs_no_token)
            if scope["type"] == "websocket":
                return await self._app(scope, receive, send)
            if needs_no_token:
                return await self._app(scope, _without_body(receive), send)
            await self._answer(scope, headers, receive, send)
        except Refused as refused:
            await _refuse(scope, send, refused)
        except ClientLeft:
            pass

    def _is_open(self, scope: Scope, headers: "Headers") -> bool:
        """Whether the request needs no token: an open path, or a browser that asks whether it may send a request."""
        if scope["type"] == "websocket":
            return False
        asks = scope["method"] == "OPTIONS" and headers.get("access-control-request-method") != ""
        return scope["path"] in self._open_paths or (asks and self._names(headers.get("origin")))

    def _check(self, headers: "Headers", needs_no_token: bool) -> None:
        if self._local_only:
            self._check_names(headers)
        if self._digests and not needs_no_token and not self._has_token(headers):
            raise Refused(401, "send the server's token as Authorization: Bearer", {"WWW-Authenticate": "Bearer"})
        if not needs_no_token:
            self._bodies.check_length(headers.get("content-length"))

    def _check_names(self, headers: "Headers") -> None:
        for host in headers.all("host"):
            if not is_loopback_name(host):
                raise Refused(403, f"header Host: expected this machine, such as 127.0.0.1, found {host[:80]!r}")
        origin = headers.get("origin")
        if origin and not self._names(origin) and not is_loopback_name(_host_of(origin)):
            raise Refused(403, f"header Origin: expected a page of this machine, found {origin[:80]!r}")

    def _names(self, origin: str) -> bool:
        return bool(origin) and not self._origins.isdisjoint((origin, "*"))

    def _has_token(self, headers: "Headers") -> bool:
        given = sha256(_token_of(headers.get("authorization"))).digest()
        return sum(compare_digest(given, digest) for digest in self._digests) > 0  # compares with all of them

    async def _answer(self, scope: Scope, headers: "Headers", receive: Receive, send: Send) -> None:
        with holding() as held:
            body = await self._bodies.read(receive, headers.get("content-length"), held)
            await _run_until_left(self._app, scope, body, receive, send)


def _host_of(origin: str) -> str:
    """The host and port of an origin; empty if it is malformed."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


class Headers:
    """The headers of a request, by lower-case name."""

    def __init__(self, scope: Scope) -> None:
        self._pairs = [(name.lower().decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]

    def all(self, name: str) -> list[str]:
        """All values of a header."""
        return [value for found, value in self._pairs if found == name]

    def get(self, name: str) -> str:
        """The first value of a header; empty if there is none."""
        return next(iter(self.all(name)), "")


async def _run_until_left(app: App, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """Call the app with the body. If the client leaves before the end of the reply, cancel the call."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    left, replied = asyncio.Event(), False

    async def replay() -> Message:
        if unread:
            return unread.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def watched(message: Message) -> None:
        nonlocal replied
        replied = replied or (message["type"] == "http.response.body" and not message.get("more_body", False))
        await send(message)

    call = asyncio.ensure_future(app(scope, replay, watched))
    watch = asyncio.ensure_future(_wait_until_left(receive))
    try:
        await asyncio.wait((call, watch), return_when=asyncio.FIRST_COMPLETED)
        left.set()
        if call.done() or replied:  # servers report a disconnect after the reply, too
            return await call
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call
    finally:
        call.cancel()
        watch.cancel()


async def _wait_until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _without_body(receive: Receive) -> Receive:
    """A `receive` that gives an empty body, and reads none."""
    unread: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def read() -> Message:
        return unread.pop() if unread else await receive()

    return read


def _token_of(header: str) -> bytes:
    """The token in the header Authorization, or nothing."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        with suppress(binascii.Error, ValueError):
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    return b""


async def _refuse(scope: Scope, send: Send, refused: Refused) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008, "reason": refused.detail[:120]})
    body = json.dumps({"detail": refused.detail}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refused.headers}
    pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
