"""Scoring by a server, with retries."""

import os
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from reward.examples import answer_row
from reward.score import Score

LONGEST_PAUSE = 30.0  # seconds between two tries
AGAIN = (408, 429, 500, 502, 503, 504)


class ScorerUnavailable(RuntimeError):
    """The server did not answer, after all retries. There is no score then, and no number in its place."""


class RemoteScorer:
    """A scorer behind `metaalign-reward serve`, or the same app on Ray Serve; it scores as `Scorer` does.

    Args:
        url: the server's, such as http://127.0.0.1:8300.
        token: the server's; without it METAALIGN_REWARD_TOKEN's.
        timeout: seconds for one answer.
        retries: after a failure that may pass: no connection, a time-out, 429 or 5xx.
        rows_a_request: rows sent together.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout: float = 120.0,
        retries: int = 8,
        rows_a_request: int = 256,
    ) -> None:
        token = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        self._url, self._retries, self._rows_a_request = url, retries, rows_a_request

    def score(self, rows: Sequence[Row | Mapping[str, Any]], *, place: str = "rows") -> list[Score]:
        """Score each row's `response`; the scores come in the rows' order.

        Raises:
            UserError: a bad row, or a request that the server refuses, such as one without its token.
            ScorerUnavailable: the server does not answer.
        """
        sent = [_record(answer_row(row, f"{place}[{index}]")) for index, row in enumerate(rows)]
        parts = range(0, len(sent), self._rows_a_request)
        return [score for start in parts for score in self._score(sent[start : start + self._rows_a_request])]

    def close(self) -> None:
        """End the connections."""
        self._client.close()

    def _score(self, records: list[dict[str, Any]]) -> list[Score]:
        reply = self._post("/score", {"rows": records})
        scores = [Score(overall=found["overall"], tiers=found["tiers"]) for found in reply["scores"]]
        if len(scores) != len(records):
            raise ScorerUnavailable(f"{self._url}: {len(scores)} scores for {len(records)} rows")
        return scores

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        for tried in range(self._retries + 1):
            pause = min(LONGEST_PAUSE, 0.2 * 2**tried) * random.uniform(0.5, 1.0)
            try:
                response = self._client.post(path, json=body)
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
            else:
                if response.is_success:
                    return response.json()
                problem = f"{response.status_code} {_detail(response)}"
                if response.status_code not in AGAIN:
                    raise UserError(f"{self._url}: {problem}")
                pause = max(pause, _asked_pause(response))
            if tried < self._retries:
                time.sleep(pause)
        raise ScorerUnavailable(f"{self._url} does not answer after {self._retries + 1} tries: {problem}")


TOKEN_VARIABLE = "METAALIGN_REWARD_TOKEN"


def _record(row: Row) -> dict[str, Any]:
    names = ("messages", "response", "system_info", "user_info")
    return {name: getattr(row, name) for name in names}


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _asked_pause(response: httpx.Response) -> float:
    asked = response.headers.get("Retry-After", "")
    return min(LONGEST_PAUSE, float(asked)) if asked.isdecimal() else 0.0
