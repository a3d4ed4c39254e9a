"""The HTTP app: scores over a batcher, with limits and a token."""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Response
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBasic, HTTPBasicCredentials, HTTPBearer

from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.errors import UserError
from reward.score import Mode, Score, combine, make_score
from reward.scorer import Scorer
from reward.serving.batcher import Batcher
from reward.serving.errors import ERRORS, add_errors, unprocessable
from reward.serving.metrics import Metrics, PrometheusMetrics
from reward.serving.middleware import BodyLimit, Counting
from reward.serving.requests import (
    Classified,
    ClassifyReply,
    ClassifyRequest,
    Problem,
    RewardReply,
    RewardRequest,
    ScoredRow,
    ScoreReply,
    ScoreRequest,
)

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Serving:
    """How a scorer is served.

    Attributes:
        name: what replies call the model.
        token: what clients must send as `Authorization: Bearer`; empty asks for none.
        mode: which score `/get_reward` answers with.
        batch_tokens: tokens a forward pass. queue_tokens: tokens that may wait; beyond them the answer is 429.
        max_wait: seconds that a request waits for others at most.
        max_rows, max_bytes: of one request.
    """

    name: str
    token: str = ""
    mode: Mode = "overall"
    batch_tokens: int = 16_384
    queue_tokens: int = 262_144
    max_wait: float = 0.005
    max_rows: int = 1024
    max_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "queue_tokens", "max_rows", "max_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected 1 or more, found {getattr(self, name)}")
        if self.max_wait < 0:
            raise UserError(f"max_wait: expected 0 seconds or more, found {self.max_wait}")


class Service:
    """The scorer and what batches its requests; the app's handlers work through it."""

    def __init__(self, scorer: Scorer, serving: Serving, metrics: Metrics) -> None:
        self.scorer, self.serving, self.metrics = scorer, serving, metrics
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")  # beside the thread that scores
        self.batcher = Batcher(
            lambda texts: scorer.logits(texts, batch_tokens=serving.batch_tokens).tolist(),
            batch_tokens=serving.batch_tokens,
            queue_tokens=serving.queue_tokens,
            max_wait=serving.max_wait,
            metrics=metrics,
        )
        self.special_tokens: list[str] = scorer.tokenizer.all_special_tokens

    async def encode(self, rows: Sequence[Row], name: str) -> list[list[int]]:
        """The token ids of rows.

        Args:
            name: what errors call the list.

        Raises:
            UserError: a row does not fit the model's context.
            HTTPException: too many rows (413).
        """
        self._limit(len(rows), name)
        return await self._aside(
            lambda: [self.scorer.encode(row, f"{name}[{index}]") for index, row in enumerate(rows)]
        )

    async def tokens(self, texts: Sequence[str | list[int]], add_special_tokens: bool) -> list[list[int]]:
        """The token ids of rendered texts, with the tokenizer's own special tokens where they are asked for.

        Raises:
            UserError: an empty text, one that is too long, or ids that the model does not have.
            HTTPException: too many texts (413).
        """
        self._limit(len(texts), "input")
        return await self._aside(
            lambda: [self._ids(text, add_special_tokens, f"input[{index}]") for index, text in enumerate(texts)]
        )

    async def score(self, texts: Sequence[list[int]]) -> list[Score]:
        """The texts' scores.

        Raises:
            Busy: too much waits already.
        """
        return [make_score(logits) for logits in await self.batcher.logits(texts)]

    def _ids(self, text: str | list[int], add_special_tokens: bool, place: str) -> list[int]:
        tokenizer, longest = self.scorer.tokenizer, self.scorer.max_tokens
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens) if isinstance(text, str) else text
        if not 0 < len(ids) <= longest:
            raise UserError(f"{place}: expected 1 to {longest} tokens, found {len(ids)}")
        if not all(0 <= token < len(tokenizer) for token in ids):
            raise UserError(f"{place}: expected token ids from 0 to {len(tokenizer) - 1}")
        return ids

    def _limit(self, count: int, name: str) -> None:
        if count > self.serving.max_rows:
            raise HTTPException(
                413, f"{name}: expected at most {self.serving.max_rows}, found {count}; send them apart"
            )

    async def _aside(self, work: Callable[[], list[list[int]]]) -> list[list[int]]:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)


def create_app(scorer: Scorer, serving: Serving, metrics: Metrics | None = None) -> FastAPI:
    """The app. Its `/metrics` answers where it counts for Prometheus itself, which it does without `metrics`."""
    metrics = metrics or PrometheusMetrics()
    service = Service(scorer, serving, metrics)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.batcher.stop()

    app = FastAPI(title="metaalign-reward", lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=serving.max_bytes)
    app.add_middleware(Counting, metrics=metrics)
    add_errors(app)
    guarded = APIRouter(dependencies=[Depends(_token_check(serving.token))] if serving.token else [])
    _add_scoring(guarded, service)
    _add_metrics(guarded, metrics)
    app.include_router(guarded)
    _add_health(app, service)  # without a token, for whoever watches over the process
    return app


def _token_check(token: str) -> Callable[..., None]:
    """The token as `Authorization: Bearer`, or as the password of a URL for clients that take nothing but a URL."""
    bearer = HTTPBearer(auto_error=False, description="the server's token")
    basic = HTTPBasic(auto_error=False, description="any name, the server's token as password")

    def check(
        by_header: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
        by_password: Annotated[HTTPBasicCredentials | None, Depends(basic)],
    ) -> None:
        given = by_header.credentials if by_header else by_password.password if by_password else ""
        if not secrets.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "send the server's token as Authorization: Bearer", {"WWW-Authenticate": "Bearer"})

    return check


def _add_scoring(app: APIRouter, service: Service) -> None:
    name, mode = service.serving.name, service.serving.mode

    @app.post("/score", responses=ERRORS)
    async def score(request: ScoreRequest) -> ScoreReply:
        """Score answers: by tier whether they do what it asks, and `overall` what they are worth."""
        with unprocessable():
            rows = request.parsed()
            texts = await service.encode(rows, "rows")
        scores = await service.score(texts)
        return ScoreReply(
            model=name, scores=[ScoredRow.of(row, found) for row, found in zip(rows, scores, strict=True)]
        )

    @app.post("/get_reward", responses=ERRORS)
    async def get_reward(request: RewardRequest) -> RewardReply:
        """OpenRLHF's remote reward: the row comes as JSON in its label."""
        with unprocessable():
            rows = request.parsed(service.special_tokens)
            texts = await service.encode(rows, "labels")
        scores = await service.score(texts)
        rewards = [combine(found, row, mode) for row, found in zip(rows, scores, strict=True)]
        logs = {label: [found.probabilities[label] for found in scores] for label in LABELS}
        return RewardReply(rewards=rewards, scores=rewards, extra_logs=logs)

    @app.post("/classify", responses=ERRORS)
    async def classify(request: ClassifyRequest) -> ClassifyReply:
        """As vLLM's: the probabilities of the four labels for rendered texts. Whoever renders a text sets its tiers."""
        with unprocessable():
            texts = await service.tokens(request.texts(), request.add_special_tokens)
        scores, tokens = await service.score(texts), sum(map(len, texts))
        data = [_classified(index, found, request.use_activation) for index, found in enumerate(scores)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        identity = f"classify-{uuid.uuid4().hex}"
        return ClassifyReply(id=identity, created=int(time.time()), model=name, data=data, usage=usage)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "rows cannot be scored", "model": Problem}})
    def ready() -> dict[str, str]:
        """Whether rows can be scored now."""
        if not service.batcher.alive:
            raise HTTPException(503, "the scoring thread has ended; start the server again")
        return {"status": "ready", "model": service.serving.name}


def _add_metrics(app: APIRouter, metrics: Metrics) -> None:
    if isinstance(metrics, PrometheusMetrics):
        page = metrics.page

        @app.get("/metrics", responses={401: ERRORS[401]}, response_class=PlainTextResponse)
        def figures() -> Response:
            """The counts in Prometheus' text format."""
            return PlainTextResponse(page(), media_type=PROMETHEUS)


def _classified(index: int, score: Score, as_probabilities: bool) -> Classified:
    values = score.probabilities if as_probabilities else score.logits
    best = max(LABELS, key=lambda label: score.logits[label])
    return Classified(index=index, label=best, probs=[values[label] for label in LABELS], num_classes=len(LABELS))
