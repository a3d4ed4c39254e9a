"""The scorer over HTTP: replies, errors, and a real server."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from conftest import ROOT, free_port
from fastapi.testclient import TestClient
from reward_toys import make_row, reward_model

from metaalign_rl.core.dataflow import LABELS, Ending
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import MetaPrompt
from metaalign_rl.scoring.terms import RewardSpec
from metaalign_rl.scoring.worker import RewardWorker
from reward import Scorer, combine
from reward.serving.app import ServingConfig, create_app
from reward.serving.client import RemoteScorer
from reward.serving.server import require_token

ROW = {
    "system_info": "say red",
    "user_info": "say blue",
    "messages": [{"role": "user", "content": "what color is it"}],
    "response": "red",
}
TOKEN = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.from_pretrained(reward_model(), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def client(scorer: Scorer) -> Iterator[TestClient]:
    with TestClient(create_app(scorer, ServingConfig("toy", max_rows=8, max_bytes=10_000))) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(scorer: Scorer) -> Iterator[TestClient]:
    with TestClient(create_app(scorer, ServingConfig("toy", token="secret"))) as client:
        yield client


# Replies.


def test_the_server_gives_the_scorers_scores(client: TestClient, scorer: Scorer) -> None:
    rows = [ROW, {**ROW, "response": "blue", "id": "second"}]
    reply = client.post("/score", json={"rows": rows}).json()
    for found, score in zip(reply["scores"], scorer.score(rows), strict=True):
        assert found["overall"] == pytest.approx(score.overall, abs=1e-5)
        assert found["tiers"] == pytest.approx(score.tiers, abs=1e-5)
        assert found["probabilities"] == pytest.approx(score.probabilities, abs=1e-5)
    assert [found["id"] for found in reply["scores"]] == [None, "second"]
    assert reply["model"] == "toy"


def test_a_single_row_needs_no_list(client: TestClient) -> None:
    assert len(client.post("/score", json={"rows": ROW}).json()["scores"]) == 1
    assert client.post("/score", json={"rows": []}).json()["scores"] == []


def test_a_null_in_a_row_counts_as_left_out(client: TestClient) -> None:
    empty = dict.fromkeys(("system_info", "family", "tier", "id", "chosen", "strength", "checks", "labels", "tags"))
    plain = {"messages": ROW["messages"], "response": ROW["response"]}
    rows = [plain, {**plain, **empty}, {**plain, "tags": {"kind": None}, "user_info": None}]
    scores = client.post("/score", json={"rows": rows}).json()["scores"]
    assert [score["overall"] for score in scores] == pytest.approx([scores[0]["overall"]] * 3, abs=1e-5)


def test_get_reward_reads_the_row_from_its_label(client: TestClient, scorer: Scorer) -> None:
    row = make_row(system_info="say red", tier="system", relation="system_only", response="red")
    prompt = MetaPrompt("say red").render(scorer.tokenizer, row.messages)
    label = json.dumps({name: value for name, value in row.to_json().items() if name != "response"})
    body = {"query": [prompt + "red<eos>"], "prompts": [prompt], "labels": [label]}
    reply = client.post("/get_reward", json=body).json()
    (score,) = scorer.score([row])
    assert reply["rewards"] == reply["scores"] == [pytest.approx(combine(score, row, "overall"), abs=1e-5)]
    assert set(reply["extra_logs"]) == set(LABELS)


def test_classify_scores_rendered_texts_as_vllm_does(client: TestClient, scorer: Scorer) -> None:
    ids = scorer.encode(ROW, "row")
    text = MetaPrompt("say red", "say blue").render(scorer.tokenizer, ROW["messages"], "red")  # type: ignore[arg-type]
    (score,) = scorer.score([ROW])
    for given in (text, [text], ids, [ids]):
        reply = client.post("/classify", json={"input": given}).json()
        assert reply["data"][0]["probs"] == pytest.approx(list(score.probabilities.values()), abs=1e-5)
        assert reply["usage"]["prompt_tokens"] == len(ids)
    logits = client.post("/classify", json={"input": text, "use_activation": False}).json()["data"][0]["probs"]
    assert logits == pytest.approx(list(score.logits.values()), abs=1e-5)
    refused = client.post("/classify", json={"input": text, "truncate_prompt_tokens": 8})
    assert (refused.status_code, "unknown field 'truncate_prompt_tokens'" in refused.text) == (422, True)


def test_the_server_counts_rows_and_requests(client: TestClient) -> None:
    def value(line: str) -> float:
        page = client.get("/metrics").text
        return sum(float(found.split()[-1]) for found in page.splitlines() if found.startswith(line))

    before = value("metaalign_reward_rows_total")
    client.post("/score", json={"rows": [ROW, ROW]})
    client.get("/unknown/path")
    assert value("metaalign_reward_rows_total") == before + 2
    assert value("metaalign_reward_queue_tokens") == 0
    assert value('metaalign_reward_requests_total{path="/score",status="200"}') > 0
    assert value('metaalign_reward_requests_total{path="none",status="404"}') == 1


def test_a_reply_says_whether_a_row_was_truncated(client: TestClient, scorer: Scorer) -> None:
    long = {**ROW, "messages": [{"role": "user", "content": "what color is it now " * 40}]}
    reply = client.post("/score", json={"rows": [ROW, long]}).json()
    assert [score["truncated"] for score in reply["scores"]] == [False, True]
    assert reply["untrained"] == []
    labels = [json.dumps({name: row[name] for name in ("messages", "system_info")}) for row in (ROW, long)]
    body = {"query": ["p red"] * 2, "prompts": ["p"] * 2, "labels": labels}
    assert client.post("/get_reward", json=body).json()["truncated"] == [False, True]


def test_a_mode_that_the_model_was_not_trained_for_is_refused_at_the_start(scorer: Scorer) -> None:
    partly = Scorer(scorer.model, scorer.tokenizer)
    partly.untrained = frozenset({"dialog", "user"})
    with pytest.raises(UserError, match="mode 'tier': it reads dialog"):
        create_app(partly, ServingConfig("toy", mode="tier"))
    partly.untrained = frozenset({"user"})
    label = {"messages": ROW["messages"], "user_info": "say red", "tier": "user"}
    body = {"query": ["p red"], "prompts": ["p"], "labels": [json.dumps(label)]}
    with TestClient(create_app(partly, ServingConfig("toy", mode="tier"))) as client:
        refused = client.post("/get_reward", json=body)
        assert (refused.status_code, "it reads user" in refused.text) == (422, True)
        assert client.post("/score", json={"rows": ROW}).json()["untrained"] == ["user"]
        body["labels"] = [json.dumps({"messages": ROW["messages"], "user_info": "say red"})]
        refused = client.post("/get_reward", json=body)
        assert (refused.status_code, "labels[0]: field 'tier'" in refused.text) == (422, True)


def test_health_and_ready_answer(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json()["status"] == "ready"


# Errors.


@pytest.mark.parametrize(
    ("change", "location"),
    [
        ({"response": None}, ["rows", 1, "response"]),
        ({"messages": [{"role": "system", "content": "x"}]}, ["messages", 0, "role"]),
        ({"messages": []}, ["messages"]),
        ({"system_info": 3}, ["system_info"]),
    ],
)
def test_an_error_names_a_malformed_row(client: TestClient, change: dict[str, Any], location: list[Any]) -> None:
    response = client.post("/score", json={"rows": [ROW, {**ROW, **change}]})
    assert response.status_code == 422
    assert any(all(part in problem["loc"] for part in location) for problem in response.json()["detail"])


def test_an_error_names_an_unknown_field_and_a_row_that_does_not_fit(client: TestClient) -> None:
    unknown = client.post("/score", json={"rows": [ROW, {**ROW, "sistem_info": "x"}]})
    assert (unknown.status_code, "rows[1]: unknown field 'sistem_info'" in unknown.text) == (422, True)
    long = client.post("/score", json={"rows": [ROW, {**ROW, "system_info": "red " * 500}]})
    assert (long.status_code, "rows[1]: max_tokens=128" in long.text) == (422, True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"query": ["x"], "prompts": [], "labels": ["{}"]},
            "lists of the same length, found 1 query, 0 prompts",
        ),
        ({"query": ["pq"], "prompts": ["p"], "labels": ["no JSON"]}, "labels[0]: expected the row as a JSON object"),
        ({"query": ["pq"], "prompts": ["z"], "labels": ["{}"]}, "query[0]: expected it to start with prompts[0]"),
        ({"query": ["pq"], "prompts": ["p"], "labels": ["{}"]}, "labels[0]: field 'messages'"),
    ],
)
def test_a_reward_request_without_a_row_is_refused(client: TestClient, body: dict[str, Any], message: str) -> None:
    response = client.post("/get_reward", json=body)
    assert response.status_code == 422
    assert message in response.json()["detail"]


@pytest.mark.parametrize("given", ["", [], [[]], [9**9], [-1], "red " * 500])
def test_texts_that_the_model_cannot_read_are_refused(client: TestClient, given: Any) -> None:
    response = client.post("/classify", json={"input": given})
    assert response.status_code == 422 or response.json()["data"] == []


def test_too_many_rows_and_too_many_bytes_are_refused(client: TestClient) -> None:
    rows = client.post("/score", json={"rows": [ROW] * 9})
    assert (rows.status_code, "at most 8, found 9" in rows.text) == (413, True)
    assert client.post("/score", json={"rows": {**ROW, "response": "x" * 20_000}}).status_code == 413
    assert client.post("/score", content=(b"x" * 3000 for _ in range(9))).status_code == 413  # no length given


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/score", {"rows": [ROW, {**ROW, "response": "x" * 301}]}, "rows[1]: expected at most 300 characters"),
        ("/score", {"rows": {**ROW, "messages": ROW["messages"] * 5}}, "rows[0]: expected at most 4 messages"),
        ("/classify", {"input": "x" * 301}, "input[0]: expected at most 300 characters"),
        (
            "/get_reward",
            {"query": ["p" * 301], "prompts": ["p"], "labels": ["{}"]},
            "labels[0]: expected at most 300 characters",
        ),
        (
            "/get_reward",
            {"query": ["pa"], "prompts": ["p"], "labels": [json.dumps({"messages": ROW["messages"] * 5})]},
            "labels[0]: expected at most 4 messages",
        ),
    ],
)
def test_a_row_that_would_take_too_long_is_refused_with_the_limit(
    scorer: Scorer, path: str, body: Any, message: str
) -> None:
    limits = ServingConfig("toy", max_row_characters=300, max_row_messages=4)
    with TestClient(create_app(scorer, limits)) as client:
        reply = client.post(path, json=body)
    assert reply.status_code == 413
    assert message in reply.json()["detail"]


def test_without_the_token_only_health_and_ready_answer(guarded: TestClient) -> None:
    for path in ("/score", "/get_reward", "/classify"):
        assert guarded.post(path, json={}).status_code == 401
        assert guarded.post(path, json={}, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert guarded.post(path, json={}, headers=TOKEN).status_code == 422
        assert guarded.post(path, json={}, auth=("any", "secret")).status_code == 422
        assert guarded.post(path, json={}, auth=("secret", "wrong")).status_code == 401
    assert guarded.get("/metrics").status_code == 401
    assert guarded.get("/health").status_code == guarded.get("/ready").status_code == 200


def test_an_address_that_other_machines_can_reach_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METAALIGN_REWARD_TOKEN", raising=False)
    assert require_token("127.0.0.1") == ""
    with pytest.raises(UserError, match="set METAALIGN_REWARD_TOKEN"):
        require_token("0.0.0.0")


def test_a_server_error_is_a_5xx_and_never_a_score(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise UserError("the model's scores are not finite")  # as Scorer for a broken checkpoint

    monkeypatch.setattr(scorer, "logits", fail)
    with TestClient(create_app(scorer, ServingConfig("toy")), raise_server_exceptions=False) as client:
        response = client.post("/score", json={"rows": ROW})
    assert response.status_code == 500
    assert "scores" not in response.text


# A busy or broken server.


FAULTS = [
    (RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might"), True),
    (type("AcceleratorError", (RuntimeError,), {})("device-side assert triggered"), True),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), False),
    (RuntimeError("broken"), False),
]


@pytest.mark.parametrize(("error", "is_sticky"), FAULTS)
def test_after_a_fault_of_the_device_the_server_is_not_ready(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch, error: Exception, is_sticky: bool
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with TestClient(create_app(scorer, ServingConfig("toy")), raise_server_exceptions=False) as client:
        with monkeypatch.context() as patch:
            patch.setattr(scorer, "logits", fail)
            assert client.post("/score", json={"rows": [ROW, ROW]}).status_code == (503 if is_sticky else 500)
        ready, again = client.get("/ready"), client.post("/score", json={"rows": ROW})
        assert (ready.status_code, again.status_code) == ((503, 503) if is_sticky else (200, 200))
        assert ("the device does not work" in ready.text) is is_sticky
        assert client.get("/health").status_code == 200


def test_a_full_server_replies_429_with_retry_after(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    scoring, resume = threading.Event(), threading.Event()
    real = scorer.logits

    def held(*args: Any, **kwargs: Any) -> Any:
        scoring.set()
        resume.wait()
        return real(*args, **kwargs)

    monkeypatch.setattr(scorer, "logits", held)
    with TestClient(create_app(scorer, ServingConfig("toy", queue_tokens=10))) as client, ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/score", json={"rows": ROW})
        scoring.wait()
        refused = client.post("/score", json={"rows": ROW})
        resume.set()
        assert first.result().status_code == 200
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1


# A real server.


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A real `metaalign-reward serve` with a token."""
    port = free_port()
    words = ["serve", "--model", str(reward_model()), "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-c", "import sys; from reward.cli import main; sys.exit(main())", *words]
    env = os.environ | {"METAALIGN_REWARD_TOKEN": "secret"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert f":{port}" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}", process
        process.kill()


def test_the_client_gives_the_scorers_scores(server: Any, scorer: Scorer) -> None:
    rows = [{**ROW, "response": "red " * length} for length in range(1, 8)]
    remote = RemoteScorer(server[0], "secret", rows_a_request=3)
    for found, score in zip(remote.score(rows), scorer.score(rows), strict=True):
        assert found.logits == pytest.approx(score.logits, abs=1e-4)
    with pytest.raises(UserError, match="401 send the server's token"):
        RemoteScorer(server[0], "wrong").score(rows)
    with pytest.raises(UserError, match=r"rows\[1\]: field 'response'"):
        remote.score([ROW, {"messages": ROW["messages"]}])


def test_ppos_reward_worker_scores_through_a_server(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAALIGN_REWARD_TOKEN", "secret")
    rows = [make_row(system_info="say red"), make_row(user_info="say blue")]
    near, far = (RewardWorker(RewardSpec(model=model, model_weight=1.0)) for model in (reward_model(), server[0]))
    endings = [Ending(finished=False, tokens=1)] * 2  # our server ignores them
    for one, other in zip(near.score(rows, ["red", "red"]), far.score(rows, ["red", "red"], endings), strict=True):
        assert one.proxy == pytest.approx(other.proxy, abs=1e-5)


def queued_tokens(url: str) -> float:
    """How many tokens the server has yet to score."""
    page = httpx.get(f"{url}/metrics", headers=TOKEN).text
    (line,) = [line for line in page.splitlines() if line.startswith("metaalign_reward_queue_tokens ")]
    return float(line.split()[1])


def open_request(url: str, rows: list[dict[str, Any]], pool: ThreadPoolExecutor) -> Future[httpx.Response]:
    """A request that the server has queued. If the answer comes first, it is sent again."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        reply = pool.submit(httpx.post, f"{url}/score", json={"rows": rows}, headers=TOKEN, timeout=60)
        while not reply.done():
            if queued_tokens(url) > 0:
                return reply
        reply.result().raise_for_status()
    raise AssertionError("no request was seen in the queue")


def test_the_rows_of_a_client_that_leaves_are_not_scored(server: Any) -> None:
    url, _ = server
    rows = [{**ROW, "response": "red " * 100}] * 1000

    def value(name: str) -> float:
        page = httpx.get(f"{url}/metrics", headers=TOKEN).text
        return sum(float(line.split()[1]) for line in page.splitlines() if line.startswith(name))

    before = value("metaalign_reward_rows_total ")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/score", json={"rows": rows}, headers=TOKEN, timeout=httpx.Timeout(30, read=0.15))
    deadline = time.monotonic() + 30
    while value("metaalign_reward_queue_tokens ") > 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert value("metaalign_reward_rows_total ") - before < 1000
    assert value('metaalign_reward_requests_total{path="/score",status="499"}') == 1


def test_after_sigterm_open_requests_are_answered(server: Any) -> None:
    """The last test of this server, which ends here."""
    url, process = server
    rows = [{**ROW, "response": "red " * 100}] * 500
    with ThreadPoolExecutor() as pool:
        reply = open_request(url, rows, pool)
        process.send_signal(signal.SIGTERM)
        assert len(reply.result().json()["scores"]) == 500
    assert process.wait(30) in (0, -signal.SIGTERM)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health")
