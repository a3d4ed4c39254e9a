"""The client of a scoring server. It retries failures that may pass."""

import os
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from metaalign_rl.core.dataflow import Ending, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.net import proxy_for, transport, via
from reward.answers import answer_row
from reward.score import Score

TOKEN_VARIABLE = "METAALIGN_REWARD_TOKEN"
MAX_PAUSE = 30.0  # seconds between two attempts
RETRIED = (408, 429, 500, 502, 503, 504)  # statuses


class ScorerUnavailable(RuntimeError):
    """The server did not answer after all retries. A failure never becomes a score."""


class RemoteScorer:
    """Scores through a server: `metaalign-reward serve`, or the same app on Ray Serve. The scores equal `Scorer`'s.

    Args:
        url: the server's address, such as http://127.0.0.1:8300.
        token: the server's token. Default: from METAALIGN_REWARD_TOKEN.
        timeout: seconds until an attempt fails.
        retries: attempts after the first one, if there is no connection, a timeout, or status 408, 429 or 5xx.
        rows_a_request: rows per request.
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
        self._proxy = proxy_for(url)
        self._client = httpx.Client(base_url=url, headers=headers, timeout=timeout, transport=transport(self._proxy))
        self._url, self._retries, self._rows_per_request = url, retries, rows_a_request

    def score(
        self,
        rows: Sequence[Row | Mapping[str, Any]],
        *,
        place: str = "rows",
        endings: Sequence[Ending] | None = None,
    ) -> list[Score]:
        """Score each row's `response`.

        Args:
            rows: see `Scorer.score`.
            place: names the list of rows in errors.
            endings: how the responses ended, sent as the fields `finished` and `tokens`; None: they are not sent.

        Returns:
            One score per row, in the order of the rows.

        Raises:
            UserError: a row is malformed, or the server refuses a request, for example without its token.
            ScorerUnavailable: the server does not answer.
        """
        records = [_record(answer_row(row, f"{place}[{index}]")) for index, row in enumerate(rows)]
        for record, ending in zip(records, endings or (), strict=endings is not None):
            record |= {"finished": ending.finished, "tokens": ending.tokens}
        starts = range(0, len(records), self._rows_per_request)
        return [score for start in starts for score in self._score(records[start : start + self._rows_per_request])]

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _score(self, records: list[dict[str, Any]]) -> list[Score]:
        reply = self._post("/score", {"rows": records})
        scores = [Score(overall=found["overall"], tiers=found["tiers"]) for found in reply["scores"]]
        if len(scores) != len(records):
            raise ScorerUnavailable(f"{self._url}: expected {len(records)} scores, found {len(scores)}")
        return scores

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        for attempt in range(self._retries + 1):
            pause = min(MAX_PAUSE, 0.2 * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                response = self._client.post(path, json=body)
            except httpx.TransportError as error:
                problem = f"{error or type(error).__name__}{via(self._proxy)}"
            else:
                if response.is_success:
                    return response.json()
                problem = f"{response.status_code} {_detail(response)}"
                if response.status_code not in RETRIED:
                    raise UserError(f"{self._url}: {problem}")
                pause = max(pause, _retry_after(response))
            if attempt < self._retries:
                time.sleep(pause)
        raise ScorerUnavailable(f"{self._url} does not answer after {self._retries + 1} tries: {problem}")


def _record(row: Row) -> dict[str, Any]:
    names = ("messages", "response", "system_info", "user_info")
    return {name: getattr(row, name) for name in names}


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait, 0 if it does not ask."""
    header = response.headers.get("Retry-After", "")
    return min(MAX_PAUSE, float(header)) if header.isdecimal() else 0.0
