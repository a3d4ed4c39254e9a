"""The client of a scoring server. It retries failures that may pass."""

import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

import httpx

from metaalign_rl.core.dataflow import LABELS, TIERS, Ending, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.net import check_url, proxy_for, transport, via
from reward.answers import answer_row
from reward.score import Score

TOKEN_VARIABLE = "METAALIGN_REWARD_TOKEN"
MAX_PAUSE = 30.0  # seconds between two attempts
RETRIED = (408, 429, 500, 502, 503, 504)  # statuses
REQUEST_BYTES = 2**18  # of the rows of one request, well below the server's limit; a single row may be longer


class ScorerUnavailable(RuntimeError):
    """The server did not answer after all retries. A failure never becomes a score."""


class RemoteScorer:
    """Scores through a server: `metaalign-reward serve`, or the same app on Ray Serve. The scores equal `Scorer`'s.

    Args:
        url: the server's address, such as http://127.0.0.1:8300, without a user or password.
        token: the server's token. Default: from METAALIGN_REWARD_TOKEN.
        timeout: seconds until an attempt fails.
        retries: attempts after the first one, if there is no connection, a timeout, or status 408, 429 or 5xx.
        rows_a_request: most rows per request; rows with long texts are fewer.

    Raises:
        UserError: the URL is not one, or holds a user, a password or a query.
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
        check_url("the scoring server's URL", url, TOKEN_VARIABLE)
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
            UserError: a row is malformed, the server refuses a request, for example without its token, or its reply
                has no scores.
            ScorerUnavailable: the server does not answer.
        """
        records = [_record(answer_row(row, f"{place}[{index}]")) for index, row in enumerate(rows)]
        for record, ending in zip(records, endings or (), strict=endings is not None):
            record |= {"finished": ending.finished, "tokens": ending.tokens}
        return [score for part in self._parts(records) for score in self._score(part)]

    def get_reward(self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
        """The reply of /get_reward to a batch in OpenRLHF's form, checked: `rewards`, `scores` and `extra_logs`.

        Raises:
            UserError, ScorerUnavailable: see `score`.
        """
        records = [
            {"query": query, "prompts": prompt, "labels": label}
            for query, prompt, label in zip(queries, prompts, labels, strict=True)
        ]
        numbers: dict[str, list[float]] = {name: [] for name in ("rewards", "scores", *LABELS)}
        for part in self._parts(records):
            for name, values in self._rewards(part).items():
                numbers[name] += values
        logs = {label: numbers.pop(label) for label in LABELS}
        return {**numbers, "extra_logs": logs}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _parts(self, records: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        part: list[dict[str, Any]] = []
        size = 0
        for record in records:
            length = len(json.dumps(record))
            if part and (len(part) == self._rows_per_request or size + length > REQUEST_BYTES):
                yield part
                part, size = [], 0
            part.append(record)
            size += length
        if part:
            yield part

    def _rewards(self, records: list[dict[str, Any]]) -> dict[str, list[float]]:
        """The lists of numbers in the reply to one request, by name."""
        reply = self._post("/get_reward", {name: [record[name] for record in records] for name in records[0]})
        found = {}
        for name in ("rewards", "scores", *LABELS):
            values = _lookup(reply, ("extra_logs", name) if name in LABELS else (name,))
            if not isinstance(values, list) or len(values) != len(records) or not all(map(_is_number, values)):
                raise self._wrong(f"{len(records)} finite numbers as {name}", values)
            found[name] = values
        return found

    def _score(self, records: list[dict[str, Any]]) -> list[Score]:
        reply = self._post("/score", {"rows": records})
        found = _lookup(reply, ("scores",))
        if not isinstance(found, list):
            raise self._wrong("a list as 'scores'", found)
        if len(found) != len(records):
            raise ScorerUnavailable(f"{self._url}: expected {len(records)} scores, found {len(found)}")
        untrained = frozenset(_lookup(reply, ("untrained",)) or ())
        return [self._one_score(value, untrained) for value in found]

    def _one_score(self, value: Any, untrained: frozenset[str]) -> Score:
        """The score in a reply. Its numbers are finite."""
        overall = _lookup(value, ("overall",))
        tiers: dict[str, float] = {tier: _lookup(value, ("tiers", tier)) for tier in TIERS}
        for number in (overall, *tiers.values()):
            if not _is_number(number):
                raise self._wrong("finite numbers as overall and tiers", value)
        return Score(overall, tiers, bool(_lookup(value, ("truncated",))), untrained)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        for attempt in range(self._retries + 1):
            pause = min(MAX_PAUSE, 0.2 * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                response = self._client.post(path, json=body)
            except httpx.TransportError as error:
                problem = f"{error or type(error).__name__}{via(self._proxy)}"
            else:
                if response.is_success:
                    return self._json(response)
                problem = f"{response.status_code} {_detail(response)}"
                if response.status_code not in RETRIED:
                    raise UserError(f"{self._url}: {problem}")
                pause = max(pause, _retry_after(response))
            if attempt < self._retries:
                time.sleep(pause)
        raise ScorerUnavailable(f"{self._url} does not answer after {self._retries + 1} tries: {problem}")

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except (ValueError, RecursionError):
            raise self._wrong("a reply in JSON", response.text) from None

    def _wrong(self, expected: str, found: Any) -> UserError:
        text = found if isinstance(found, str) else repr(found)
        return UserError(
            f"{self._url}: expected {expected}, found {text[:80]!r}; give the address of `metaalign-reward serve`"
        )


def _record(row: Row) -> dict[str, Any]:
    names = ("messages", "response", "system_info", "user_info")
    return {name: getattr(row, name) for name in names}


def _lookup(value: Any, path: Sequence[str]) -> Any:
    """The value at a path of keys; None if a part of the path is missing."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and isfinite(value)


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return response.text[:200]


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait, 0 if it does not ask."""
    header = response.headers.get("Retry-After", "")
    return min(MAX_PAUSE, float(header)) if header.isdecimal() else 0.0
