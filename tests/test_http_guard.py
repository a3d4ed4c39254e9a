"""The guard in front of the HTTP servers: tokens, names of hosts, and the limits of bodies."""

import asyncio
import json
import time
import tracemalloc
from base64 import b64encode
from dataclasses import replace
from typing import Any

import pytest
from asgi import Client, Echo
from hypothesis import given, settings
from hypothesis import strategies as st

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.http_guard import Guard
from metaalign_rl.core.net import check_url, is_loopback_name
from metaalign_rl.core.request_bodies import BodyLimits, Budget, count_values

TOKEN = {"Authorization": "Bearer secret"}
SMALL = BodyLimits(max_bytes=200_000, max_values=20_000, seconds=0.2, open_bodies=3)


def ask(guard: Any, **request: Any) -> Client:
    """A client after its request."""

    async def run() -> Client:
        client = Client(guard)
        await client.send(**request)
        return client

    return asyncio.run(run())


# Tokens.


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer wrong", "Bearer", "Bearer secret2", "Basic secret", f"Basic {b64encode(b'secret:x').decode()}",
     "Digest secret", "Basic \xff\xfe", "Bearer sécret"],
)  # fmt: skip
def test_without_the_token_no_byte_of_the_body_is_read(authorization: str) -> None:
    echo = Echo()
    client = ask(Guard(echo, tokens=["secret"]), headers={"Authorization": authorization}, parts=[b"x"] * 9)
    assert (client.status, client.parts_read, echo.bodies) == (401, 0, [])
    assert "send the server's token" in client.text


@pytest.mark.parametrize(
    "authorization", ["Bearer secret", "bearer secret", f"Basic {b64encode(b'any:secret').decode()}", "Bearer other"]
)
def test_a_request_with_one_of_the_tokens_is_answered(authorization: str) -> None:
    client = ask(Guard(Echo(), tokens=["secret", "other"]), headers={"Authorization": authorization}, parts=[b"abc"])
    assert (client.status, client.text) == (200, "3")


def test_an_open_path_needs_no_token_and_its_body_is_not_read() -> None:
    guard = Guard(Echo(), tokens=["secret"], open_paths=("/health",))
    client = ask(guard, path="/health", parts=[b"x" * 1000] * 9)
    assert (client.status, client.text, client.parts_read) == (200, "0", 0)
    for path in ("/health/", "/health/x", "//health", "/Health", "/invocations", "/healthz"):
        assert ask(guard, path=path).status == 401


def test_a_websocket_needs_the_token_too() -> None:
    guard = Guard(Echo(), tokens=["secret"], open_paths=("/health",))
    for path in ("/v1/realtime", "/health"):
        refused = ask(guard, path=path, kind="websocket")
        assert [message["type"] for message in refused.sent] == ["websocket.close"]
    assert ask(guard, path="/", kind="websocket", headers=TOKEN).sent == [{"type": "websocket.accept"}]


# Names of hosts and origins.


@pytest.mark.parametrize(
    ("name", "expected"),
    [("127.0.0.1", True), ("127.0.0.1:8300", True), ("localhost:80", True), ("LOCALHOST", True), ("[::1]:8300", True),
     ("chat.localhost:1", True), ("localhost.", True), ("evil.example", False), ("127.0.0.1.evil.example", False),
     ("localhost.evil.example:8300", False), ("10.0.0.1", False), ("", False), ("[::2]", False)],
)  # fmt: skip
def test_names_of_this_machine_are_recognized(name: str, expected: bool) -> None:
    assert is_loopback_name(name) is expected


def test_a_local_server_answers_only_requests_that_name_this_machine() -> None:
    """DNS rebinding: a page's own name resolves to 127.0.0.1, so a browser lets the page read the replies."""
    guard = Guard(Echo(), local_only=True, open_paths=("/health",))
    for path in ("/", "/health"):
        refused = ask(guard, path=path, headers={"Host": "evil.example:8300"}, parts=[b"x"])
        assert (refused.status, refused.parts_read) == (403, 0)
        assert "header Host: expected this machine" in refused.text
    assert ask(guard, headers={"Host": "localhost:8300"}).status == 200
    assert ask(guard).status == 200  # HTTP/1.0 has no such header
    assert ask(Guard(Echo()), headers={"Host": "scorer.internal"}).status == 200


def test_a_local_server_refuses_pages_of_other_sites_unless_they_are_named() -> None:
    guard = Guard(Echo(), local_only=True, origins=["https://mine.example"])
    for origin, status in (
        ("https://evil.example", 403), ("null", 403), ("http://[", 403), ("http://localhost:3000", 200),
        ("https://mine.example", 200),
    ):  # fmt: skip
        assert ask(guard, headers={"Host": "127.0.0.1", "Origin": origin}).status == status
        kind = ask(guard, headers={"Host": "127.0.0.1", "Origin": origin}, kind="websocket").sent[0]["type"]
        assert kind == ("websocket.accept" if status == 200 else "websocket.close")


def test_a_browser_may_ask_without_a_token_only_for_a_named_origin() -> None:
    guard = Guard(Echo(), tokens=["secret"], origins=["https://mine.example"])
    asks = {"Access-Control-Request-Method": "POST"}
    assert ask(guard, method="OPTIONS", headers={**asks, "Origin": "https://mine.example"}).status == 200
    assert ask(guard, method="OPTIONS", headers={**asks, "Origin": "https://evil.example"}).status == 401
    assert ask(guard, method="OPTIONS", headers={"Origin": "https://mine.example"}).status == 401
    assert ask(guard, method="POST", headers={**asks, "Origin": "https://mine.example"}).status == 401


# Bodies.


def test_a_body_that_declares_too_many_bytes_is_refused_before_it_is_read() -> None:
    client = ask(Guard(Echo(), limits=SMALL), headers={"Content-Length": "200001"}, parts=[b"x"] * 9)
    assert (client.status, client.parts_read) == (413, 0)
    assert "expected at most 200000 bytes" in client.text


def test_a_body_without_a_length_is_read_up_to_the_limit() -> None:
    client = ask(Guard(Echo(), limits=SMALL), parts=[b"x" * 50_000] * 100)
    assert (client.status, client.parts_read) == (413, 5)
    assert ask(Guard(Echo(), limits=SMALL), parts=[b"x" * 50_000] * 4).text == "200000"


def test_a_body_that_comes_too_slowly_is_refused() -> None:
    client = ask(Guard(Echo(), limits=SMALL), parts=[b"x", b"x"], stalls=True)
    assert client.status == 408
    assert "within 0.2 s" in client.text


def test_a_client_that_leaves_during_its_body_gets_no_reply() -> None:
    async def run() -> Client:
        client = Client(Guard(Echo()))
        client.leave.set()
        await client.send(parts=[b"x", b"x"], stalls=True)
        return client

    assert asyncio.run(run()).sent == []


def test_large_bodies_share_a_budget_and_small_ones_never_wait() -> None:
    """The first large body holds the budget until its reply. The second one waits, then gets it."""

    async def run() -> list[Any]:
        echo = Echo(wait=0.3)
        guard = Guard(echo, limits=replace(SMALL, seconds=10))
        headers = {"Content-Length": "150000"}
        large = [Client(guard), Client(guard)]
        asked = [asyncio.create_task(one.send(headers=headers, parts=[b"x" * 75_000] * 2)) for one in large]
        while not echo.bodies:
            await asyncio.sleep(0.01)
        read = len(echo.bodies)
        small = asyncio.create_task(Client(guard).send(parts=[b"x" * 1000]))
        return [read, large[1].parts_read, await small, *await asyncio.gather(*asked)]

    assert asyncio.run(run()) == [1, 1, 200, 200, 200]


def test_a_large_body_that_finds_no_memory_in_time_is_told_to_try_again() -> None:
    async def run() -> Client:
        guard = Guard(Echo(wait=1.0), limits=SMALL)
        first, second = Client(guard), Client(guard)
        holds = asyncio.create_task(first.send(headers={"Content-Length": "150000"}, parts=[b"x" * 150_000]))
        await asyncio.sleep(0.02)
        await second.send(headers={"Content-Length": "150000"}, parts=[b"x" * 150_000])
        holds.cancel()
        return second

    second = asyncio.run(run())
    assert (second.status, "try again" in second.text) == (503, True)
    assert (b"retry-after", b"1") in second.sent[0]["headers"]


def test_only_so_many_bodies_are_read_at_a_time() -> None:
    async def run() -> list[int | None]:
        guard = Guard(Echo(), limits=SMALL)
        slow = [asyncio.create_task(Client(guard).send(parts=[b"x", b"x"], stalls=True)) for _ in range(3)]
        await asyncio.sleep(0.02)
        refused = await Client(guard).send(parts=[b"x"])
        await asyncio.gather(*slow)
        return [refused, await Client(guard).send(parts=[b"x"])]

    assert asyncio.run(run()) == [503, 200]


def test_a_body_with_too_many_json_values_is_refused_before_it_is_parsed() -> None:
    message = json.dumps({"role": "user", "content": "x"})
    many = f'{{"messages": [{", ".join([message] * 4500)}]}}'.encode()
    client = ask(Guard(Echo(), limits=SMALL), parts=[many])
    assert (client.status, "at most 20,000 JSON values per request" in client.text) == (413, True)
    text = json.dumps({"rows": {"response": "a,b:[{" * 20_000}}).encode()  # separators in a text are not values
    assert ask(Guard(Echo(), limits=SMALL), parts=[text]).status == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\,:[{\n', max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text('a"\\,:', max_size=3), inner, max_size=5),
    max_leaves=30,
)


def values_in(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(1 + values_in(inner) for inner in value.values())
    return 1 + sum(map(values_in, value)) if isinstance(value, list) else 1


@settings(deadline=None)
@given(JSON)
def test_the_number_of_json_values_is_counted_without_parsing(value: Any) -> None:
    counted, real = count_values(json.dumps(value).encode(), 10**9), values_in(value)
    assert real / 2 <= counted <= 2 * real


@pytest.mark.parametrize("part", [b'\\"', b'"', b"\\", b'","', b"[],"], ids=repr)
def test_counting_takes_linear_time_and_little_memory(part: bytes) -> None:
    body = b'"' + part * (2**22 // len(part))
    tracemalloc.start()
    began = time.process_time()
    count_values(body, 2**16)
    assert time.process_time() - began < 2
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10), st.booleans()), max_size=12))
def test_a_budget_is_given_back_whoever_is_cancelled(requests: list[tuple[int, bool]]) -> None:
    async def run() -> None:
        budget = Budget(10)

        async def use(amount: int) -> None:
            await budget.take(amount)
            try:
                await asyncio.sleep(0)
            finally:
                budget.give_back(amount)

        tasks = [asyncio.create_task(use(amount)) for amount, _ in requests]
        await asyncio.sleep(0)
        for task, (_, stops) in zip(tasks, requests, strict=True):
            if stops:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(budget.take(10), 1)

    asyncio.run(run())


# Clients that leave.


def test_the_work_of_a_client_that_left_is_cancelled() -> None:
    async def run() -> tuple[Echo, Client]:
        echo = Echo(wait=60)
        client = Client(Guard(echo))
        asked = asyncio.create_task(client.send(parts=[b"x"]))
        await asyncio.sleep(0.02)
        client.leave.set()
        await asyncio.wait_for(asked, 1)
        return echo, client

    echo, client = asyncio.run(run())
    assert (echo.cancelled, client.sent) == (1, [])


def test_work_after_the_reply_is_not_cancelled() -> None:
    """Servers report a disconnect as soon as the reply is complete."""
    done = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        await asyncio.sleep(0.02)
        done.append(True)

    async def run() -> None:
        client = Client(Guard(app))
        client.leave.set()
        await client.send(parts=[b"x"])

    asyncio.run(run())
    assert done == [True]


def test_the_apps_own_error_reaches_the_server() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask(Guard(app), parts=[b"x"])


# URLs.


@pytest.mark.parametrize(
    "url",
    ["http://any:SECRET@host", "http://SECRET@host:8300/x", "any:SECRET@host", "https://host/?token=SECRET",
     "http://host#SECRET", "http://user:SECRET/@host", "HTTP://u:SECRET@host"],
)  # fmt: skip
def test_a_url_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(UserError, match="reward.url: expected a URL without .*THE_TOKEN") as refused:
        check_url("reward.url", url, "THE_TOKEN")
    assert "SECRET" not in str(refused.value)


def test_a_plain_url_is_accepted() -> None:
    check_url("reward.url", "http://127.0.0.1:8300", "X")
    check_url("reward.url", "https://scorer.example/path/", "X")
    with pytest.raises(UserError, match="reward.url: expected a URL such as"):
        check_url("reward.url", "scorer:8300", "X")
