"""Bodies of HTTP requests: read with limits on their size, their time and the memory of all of them together."""

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

FREE_BYTES = 64 * 2**10  # of each body: a small request never waits for large ones
FREE_VALUES = 4096  # the same for JSON values
PAUSE = 0.03  # seconds between two large bodies, whose parsing blocks the event loop: others are answered meanwhile
# A string without its end counts as one too: searching for the end again from every quote would take quadratic time.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """What the bodies of a server's requests may take.

    Attributes:
        max_bytes: of one body, and of all bodies in memory together, apart from the first 64 KiB of each.
        max_values: JSON values of one body (keys, strings, numbers, lists and objects), and of all bodies together,
            apart from the first 4,096 of each. In Python a value takes about 100 bytes, whatever it takes in JSON.
        seconds: from a request's headers to the end of its body.
        open_bodies: most bodies that are read at a time.
    """

    max_bytes: int = 4 * 2**20
    max_values: int = 2**16
    seconds: float = 20.0
    open_bodies: int = 256


class Refused(Exception):
    """A request that gets no answer but an error: an HTTP status and one line of text."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


class ClientLeft(Exception):
    """The client closed the connection before the end of its request."""


class BodyReader:
    """Reads the bodies of one server's requests."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._bytes, self._values = Budget(limits.max_bytes), Budget(limits.max_values)
        self._turn = asyncio.Lock()  # large bodies are counted and passed on one by one
        self._reading = 0

    def check_length(self, declared: str) -> None:
        """Refuse a request by its header Content-Length, before its body is read.

        Raises:
            Refused: 413, the body is too large.
        """
        if declared.isdecimal() and int(declared) > self._limits.max_bytes:
            raise self._too_large()

    async def read(self, receive: Receive, declared: str, held: "Held") -> bytes:
        """The whole body. What it takes of the budgets is kept in `held` until `held.release()`.

        Args:
            declared: the header Content-Length; empty if the request has none.

        Raises:
            Refused: 413, it has too many bytes or JSON values; 408, it comes too slowly; 503, too many other bodies are
                in memory.
            ClientLeft: the connection closed.
        """
        if self._reading >= self._limits.open_bodies:
            raise _busy()
        self._reading += 1
        try:
            async with asyncio.timeout(self._limits.seconds):
                body = await self._read(
                    receive, int(declared) if declared.isdecimal() else self._limits.max_bytes, held
                )
                await self._count_values(body, held)
        except TimeoutError:
            raise self._too_slow(held) from None
        finally:
            self._reading -= 1
        return body

    async def _read(self, receive: Receive, length: int, held: "Held") -> bytes:
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self._limits.max_bytes:
                raise self._too_large()
            if size > FREE_BYTES and not held.amounts:
                await held.take(self._bytes, max(length, size))
        return b"".join(parts)

    async def _count_values(self, body: bytes, held: "Held") -> None:
        most = self._limits.max_values
        if len(body) <= FREE_BYTES and 1 + _separators(body, 0, len(body)) <= FREE_VALUES:
            return
        async with self._turn:
            values = count_values(body, most)
            await asyncio.sleep(PAUSE)
        if values > most:
            detail = f"expected at most {most:,} JSON values per request, found more; send several requests"
            raise Refused(413, detail)
        if values > FREE_VALUES:
            await held.take(self._values, values)

    def _too_large(self) -> Refused:
        limit = self._limits.max_bytes
        return Refused(413, f"expected at most {limit} bytes per request; send the rows in several requests")

    def _too_slow(self, held: "Held") -> Refused:
        if held.is_waiting:
            return _busy()
        seconds = self._limits.seconds
        return Refused(408, f"expected the whole body within {seconds:g} s; send it faster", {"Connection": "close"})


class Budget:
    """An amount that requests share. They get their parts in the order in which they asked."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, amount: int) -> None:
        """Wait until the amount is free, and take it."""
        if not self._waiting and amount <= self._free:
            self._free -= amount
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            self.give_back(0 if turn.cancelled() else amount)
            raise

    def give_back(self, amount: int) -> None:
        """Free the amount, and serve those who wait."""
        self._free += amount
        while self._waiting and (self._waiting[0][1].cancelled() or self._waiting[0][0] <= self._free):
            asked, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._free -= asked
                turn.set_result(None)


class Held:
    """What one request has taken of the budgets."""

    def __init__(self) -> None:
        self.amounts: list[tuple[Budget, int]] = []
        self.is_waiting = False

    async def take(self, budget: Budget, amount: int) -> None:
        """Take a part of a budget; see `Budget.take`."""
        self.is_waiting = True
        await budget.take(amount)
        self.is_waiting = False
        self.amounts.append((budget, amount))

    def release(self) -> None:
        """Give everything back."""
        for budget, amount in self.amounts:
            budget.give_back(amount)
        self.amounts.clear()


@contextmanager
def holding() -> Iterator[Held]:
    """What a request holds, until the block ends."""
    held = Held()
    try:
        yield held
    finally:
        held.release()


def count_values(body: bytes, most: int) -> int:
    """About how many JSON values a body has, keys included: the separators outside its strings, plus 1.

    It is counted before the body is parsed: 3 bytes of JSON (`[],`) become 60 bytes of Python.

    Args:
        most: the count ends above this number.
    """
    values, end = 1, 0
    for strings, string in enumerate(_STRING.finditer(body)):
        values += _separators(body, end, string.start())
        end = string.end()
        if max(values, strings) > most:  # each string is a value, whatever is between them
            return max(values, strings)
    return values + _separators(body, end, len(body))


def _separators(body: bytes, start: int, end: int) -> int:
    return sum(body.count(mark, start, end) for mark in (b",", b":", b"[", b"{"))


def _busy() -> Refused:
    return Refused(503, "too many requests are being read; try again", {"Retry-After": "1"})
