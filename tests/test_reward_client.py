"""The client of the scoring server: retries, and replies that are no scores."""

import json
import time
from typing import Any

import httpx
import pytest
from reward_toys import make_row

from metaalign_rl.core.dataflow import LABELS, Ending
from metaalign_rl.core.errors import UserError
from reward import combine
from reward.serving.client import RemoteScorer, ScorerUnavailable

ROW = {
    "system_info": "say red",
    "user_info": "say blue",
    "messages": [{"role": "user", "content": "what color is it"}],
    "response": "red",
}


def answering(*replies: httpx.Response | Exception) -> tuple[RemoteScorer, list[httpx.Request]]:
    """A client whose server gives these replies one after the other, and the list of requests that it receives."""
    requests: list[httpx.Request] = []
    waiting = iter(replies)

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        reply = next(waiting)
        if isinstance(reply, Exception):
            raise reply
        return reply

    remote = RemoteScorer("http://server", retries=3)
    remote._client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(handle))
    return remote, requests


SCORED = {"scores": [{"overall": 1.0, "tiers": {"system": 0.0, "user": 0.0, "dialog": 0.0}}]}


def test_the_client_retries_failures_that_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    failures = (httpx.ConnectError("refused"), httpx.Response(503), httpx.Response(429, headers={"Retry-After": "7"}))
    remote, requests = answering(*failures, httpx.Response(200, json=SCORED))
    assert remote.score([ROW])[0].overall == 1.0
    assert len(requests) == 4
    assert len(pauses) == 3
    assert pauses[2] >= 7


def test_the_client_tells_the_server_how_a_response_ended() -> None:
    remote, requests = answering(*[httpx.Response(200, json=SCORED)] * 2)
    remote.score([ROW], endings=[Ending(finished=False, tokens=32)])
    remote.score([ROW])
    first, second = (json.loads(request.content)["rows"][0] for request in requests)
    assert (first.pop("finished"), first.pop("tokens")) == (False, 32)
    assert first == second


def test_a_server_that_does_not_answer_is_an_error_and_never_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    remote, requests = answering(*[httpx.Response(500, text="broken")] * 4)
    with pytest.raises(ScorerUnavailable, match="after 4 tries: 500 broken"):
        remote.score([ROW])
    assert len(requests) == 4


def tiers(**values: Any) -> dict[str, Any]:
    return {"scores": [{"overall": 1.0, "tiers": {"system": 0.0, "user": 0.0, "dialog": 0.0} | values}]}


@pytest.mark.parametrize(
    "reply",
    [
        httpx.Response(200, text="<html>Please log in</html>"),
        httpx.Response(200, content=json.dumps(SCORED).encode()[:-3]),
        httpx.Response(200, text="[" * 100_000),
        httpx.Response(200, text='{"scores": [{"overall": NaN, "tiers": {"system": 0, "user": 0, "dialog": 0}}]}'),
        httpx.Response(200, text=json.dumps(tiers(user=float("inf")))),
        httpx.Response(200, json=tiers(user=None)),
        httpx.Response(200, json=tiers(user="0.5")),
        httpx.Response(200, json=tiers(user=True)),
        httpx.Response(200, json={"scores": [{"overall": 1.0}]}),
        httpx.Response(200, json={"scores": [None]}),
        httpx.Response(200, json={"scores": None}),
        httpx.Response(200, json=[]),
    ],
    ids=lambda reply: reply.text[:40],
)
def test_a_reply_without_finite_scores_is_a_clear_error_and_never_a_score(reply: httpx.Response) -> None:
    remote, requests = answering(reply)
    with pytest.raises(UserError, match="http://server: expected .*, found .*give the address of `metaalign-reward"):
        remote.score([ROW])
    assert len(requests) == 1


def test_a_reply_of_rewards_is_checked_too() -> None:
    remote, _ = answering(httpx.Response(200, json={"rewards": [0.5], "scores": [0.5], "extra_logs": {}}))
    with pytest.raises(UserError, match="expected 1 finite numbers as system, found 'None'"):
        remote.get_reward(["pa"], ["p"], ["{}"])


def test_the_client_reads_what_was_truncated_and_what_the_model_was_not_trained_on() -> None:
    reply = SCORED | {"untrained": ["dialog"], "scores": [SCORED["scores"][0] | {"truncated": True}]}
    (score,) = answering(httpx.Response(200, json=reply))[0].score([ROW])
    assert (score.truncated, score.untrained) == (True, {"dialog"})
    with pytest.raises(UserError, match="it reads dialog"):
        combine(score, make_row(), "tier")


def test_the_client_splits_long_rows_over_requests() -> None:
    def scored(request: httpx.Request) -> httpx.Response:
        sizes.append(len(request.content))
        return httpx.Response(200, json={"scores": SCORED["scores"] * len(json.loads(request.content)["rows"])})

    sizes: list[int] = []
    remote = RemoteScorer("http://server")
    remote._client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(scored))
    assert len(remote.score([{**ROW, "response": "red " * 25_000}] * 7)) == 7
    assert len(sizes) == 4
    assert max(sizes) < 2**19


def test_a_batch_of_rewards_is_split_over_requests_too() -> None:
    def rewarded(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["query"]
        counts.append(len(texts))
        numbers = [float(text) for text in texts]
        return httpx.Response(
            200, json={"rewards": numbers, "scores": numbers, "extra_logs": dict.fromkeys(LABELS, numbers)}
        )

    counts: list[int] = []
    remote = RemoteScorer("http://server", rows_a_request=4)
    remote._client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(rewarded))
    queries = [str(number) for number in range(10)]
    found = remote.get_reward(queries, queries, queries)
    assert counts == [4, 4, 2]
    assert found["rewards"] == found["extra_logs"]["overall"] == list(map(float, range(10)))


def test_the_clients_address_holds_no_secret() -> None:
    with pytest.raises(UserError, match="without a user or password; set METAALIGN_REWARD_TOKEN") as refused:
        RemoteScorer("http://any:hidden@server")
    assert "hidden" not in str(refused.value)
