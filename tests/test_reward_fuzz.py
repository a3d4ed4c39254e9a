"""Fuzz tests of the scoring server: requests generated from its OpenAPI description, and broken JSON."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from reward_toys import reward_model

from metaalign_rl.core.net import listen
from reward import Scorer
from reward.serving.app import ServingConfig, create_app

TOKEN = {"Authorization": "Bearer secret"}


@contextmanager
def served(scorer: Scorer, **limits: int) -> Iterator[str]:
    """A real server with a token, in a thread. Yields its address."""
    socket = listen("127.0.0.1", 0)
    app = create_app(scorer, ServingConfig("toy", token="secret", **limits))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.from_pretrained(reward_model(), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def url(scorer: Scorer) -> Iterator[str]:
    with served(scorer, max_rows=8, max_bytes=200_000) as url:
        yield url


def fuzz(url: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Send requests that schemathesis generates from the description, and check each reply against it."""
    command = [sys.executable, "-m", "schemathesis.cli", "--no-color", "run", f"{url}/openapi.json"]
    # A well-formed request may be too long for the model, or end with the wrong role. No schema can express that.
    given = ["--generation-deterministic", "--continue-on-failure", "--exclude-checks", "positive_data_acceptance"]
    token = ["--header", "Authorization: Bearer secret"]
    return subprocess.run([*command, *given, *token, *words], cwd=folder, capture_output=True, text=True)


def answered(url: str, path: str, status: int) -> int:
    """The number of requests to the path that the server has answered with the status."""
    page = httpx.get(f"{url}/metrics", headers=TOKEN).text
    line = f'metaalign_reward_requests_total{{path="{path}",status="{status}"}} '
    return sum(int(float(found.removeprefix(line))) for found in page.splitlines() if found.startswith(line))


def test_every_reply_to_a_generated_request_fits_the_description(url: str, tmp_path: Path) -> None:
    done = fuzz(url, tmp_path, "--max-examples", "60")
    assert done.returncode == 0, done.stdout
    for path in ("/score", "/get_reward", "/classify"):
        assert answered(url, path, 200) > 5, f"{path}: no request reached the scorer"
        assert answered(url, path, 422) > 20
        assert answered(url, path, 401) > 0


def test_the_fuzz_test_would_find_a_server_error(tmp_path: Path) -> None:
    scorer = Scorer.from_pretrained(reward_model(), device="cpu", dtype="float32")
    scorer.logits = lambda *_, **__: 1 / 0  # type: ignore[assignment, method-assign]
    with served(scorer) as url:
        done = fuzz(url, tmp_path, "--max-examples", "2", "--include-path", "/score")
    assert done.returncode == 1
    assert "Server error" in done.stdout


def test_the_examples_of_the_description_get_scores(url: str) -> None:
    description = httpx.get(f"{url}/openapi.json").json()
    for path in ("/score", "/get_reward", "/classify"):
        body = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = body["$ref"].rpartition("/")[2]
        for example in description["components"]["schemas"][name]["examples"]:
            assert httpx.post(url + path, json=example, headers=TOKEN).status_code == 200


# Requests that schemathesis does not generate: JSON that Python reads, but that UTF-8 or JSON cannot express.


def with_field(field: str) -> str:
    return '{"rows": {"messages": [{"role": "user", "content": "hi"}], "response": "x", ' + field + "}}"


def labelled(label: str) -> str:
    return json.dumps({"query": ["p a"], "prompts": ["p"], "labels": [label]})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/score", '{"rows": NaN}'),
        ("/score", '{"rows": 1e999}'),
        ("/score", '{"\\ud800": 1}'),
        ("/score", with_field('"\\ud800": 1')),
        ("/score", with_field('"id": "\\ud800"')),
        ("/score", with_field('"response": "\\ud800"')),
        ("/score", with_field('"tags": {"a": NaN}')),
        ("/score", with_field('"labels": {"response": {"\\ud800": true}}')),
        ("/score", '{"rows": ' + "[" * 1_000 + "]" * 1_000 + "}"),
        ("/score", '{"rows": ' + "1" * 10_000 + "}"),
        ("/score", b"\xff"),
        ("/get_reward", labelled('{"messages": [{"role": "user", "content": "\\ud800"}]}')),
        ("/get_reward", labelled("[" * 50_000)),
        ("/get_reward", '{"query": ["\\ud800"], "prompts": [""], "labels": ["{}"]}'),
        ("/classify", '{"input": "\\ud800"}'),
        ("/classify", '{"input": [true]}'),
        ("/classify", f'{{"input": [{2**70}]}}'),
    ],
    ids=lambda value: str(value)[:60],
)
def test_malformed_json_and_broken_characters_are_refused(url: str, path: str, body: Any) -> None:
    response = httpx.post(url + path, content=body, headers={**TOKEN, "Content-Type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert response.json()["detail"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/score", '{"rows": [' + "1," * 90_000 + "1]}"),
        ("/score", '{"rows": ' + "[" * 50_000 + "]" * 50_000 + "}"),
        ("/score", json.dumps({f"{number:x}": 1 for number in range(15_000)})),
        ("/score", with_field(", ".join(f'"{number:x}": 1' for number in range(10_000)))),
        ("/get_reward", '{"prompts": [], "labels": [], "query": [' + "1," * 90_000 + "1]}"),
        ("/classify", '{"input": [' + "[]," * 60_000 + "1.5]}"),
    ],
    ids=["rows", "nested lists", "fields", "fields of a row", "queries", "inputs"],
)
def test_a_request_with_many_errors_gets_a_short_reply(url: str, path: str, body: str) -> None:
    response = httpx.post(url + path, content=body, headers={**TOKEN, "Content-Type": "application/json"})
    assert response.status_code in (413, 422)
    assert len(response.content) < 2000
