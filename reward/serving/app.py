"""The HTTP app: it scores through a batcher, with limits and a token."""

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
from reward.serving.error_replies import ERRORS, add_error_replies, user_errors_as_422
from reward.serving.middleware import BodyLimit, RequestMetrics
from reward.serving.schemas import (
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
from reward.serving.server_metrics import PrometheusMetrics, ServerMetrics

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """The settings of a scoring server.

    Attributes:
        name: the model's name in replies.
        token: clients must send it as `Authorization: Bearer`; no token is needed if it is empty.
        mode: the score that `/get_reward` returns; see `combine`.
        batch_tokens: tokens per forward pass.
        queue_tokens: tokens that may wait; a request beyond them gets status 429.
        max_wait: longest wait of a request for others, in seconds.
        max_rows, max_bytes: limits of one request.
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


class ScoringService:
    """The scorer with its batcher, for the app's handlers."""

    def __init__(self, scorer: Scorer, config: ServingConfig, metrics: ServerMetrics) -> None:
        self.scorer, self.config, self.metrics = scorer, config, metrics
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")  # runs while the batcher's thread scores
        self.batcher = Batcher(
            lambda texts: scorer.logits(texts, batch_tokens=config.batch_tokens).tolist(),
            batch_tokens=config.batch_tokens,
            queue_tokens=config.queue_tokens,
            max_wait=config.max_wait,
            metrics=metrics,
        )
        self.special_tokens: list[str] = scorer.tokenizer.all_special_tokens

    async def encode(self, rows: Sequence[Row], name: str) -> list[list[int]]:
        """The token ids of rows.

        Args:
            name: names the list of rows in errors.

        Raises:
            UserError: a row does not fit the model's context.
            HTTPException: there are too many rows (413).
        """
        self._check_number(len(rows), name)
        return await self._in_thread(
            lambda: [self.scorer.encode(row, f"{name}[{index}]") for index, row in enumerate(rows)]
        )

    async def tokens(self, texts: Sequence[str | list[int]], add_special_tokens: bool) -> list[list[int]]:
        """The token ids of rendered texts.

        Args:
            texts: each as a string or as token ids.
            add_special_tokens: add the tokenizer's special tokens to strings.

        Raises:
            UserError: a text is empty or too long, or has token ids that the model does not have.
            HTTPException: there are too many texts (413).
        """
        self._check_number(len(texts), "input")
        return await self._in_thread(
            lambda: [self._ids(text, add_special_tokens, f"input[{index}]") for index, text in enumerate(texts)]
        )

    async def score(self, texts: Sequence[list[int]]) -> list[Score]:
        """The scores of texts.

        Raises:
            QueueFull: too many tokens are waiting.
        """
        return [make_score(logits) for logits in await self.batcher.logits(texts)]

    def _ids(self, text: str | list[int], add_special_tokens: bool, place: str) -> list[int]:
        tokenizer, longest = self.scorer.tokenizer, self.scorer.max_tokens
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens) if isinstance(text, str) else text
        if not 0 < len(ids) <= longest:
            raise UserError(f"{place}: expected 1 to {longest} tokens, found {len(ids)}")
        unknown = [token for token in ids if not 0 <= token < len(tokenizer)]
        if unknown:
            raise UserError(f"{place}: expected token ids from 0 to {len(tokenizer) - 1}, found {unknown[0]}")
        return ids

    def _check_number(self, number: int, name: str) -> None:
        if number > self.config.max_rows:
            raise HTTPException(
                413, f"{name}: expected at most {self.config.max_rows}, found {number}; send several requests"
            )

    async def _in_thread(self, work: Callable[[], list[list[int]]]) -> list[list[int]]:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)


def create_app(scorer: Scorer, config: ServingConfig, metrics: ServerMetrics | None = None) -> FastAPI:
    """The app.

    Args:
        metrics: receives the server's metrics. Default: `PrometheusMetrics`, which the app serves at `/metrics`.
    """
    metrics = metrics or PrometheusMetrics()
    service = ScoringService(scorer, config, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.batcher.stop()

    app = FastAPI(title="metaalign-reward", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=config.max_bytes)
    app.add_middleware(RequestMetrics, metrics=metrics)
    add_error_replies(app)
    guarded = APIRouter(dependencies=[Depends(_token_check(config.token))] if config.token else [])
    _add_scoring(guarded, service)
    _add_metrics(guarded, metrics)
    app.include_router(guarded)
    _add_health(app, service)  # without a token, for the process's supervisor
    return app


def _token_check(token: str) -> Callable[..., None]:
    """Check the token: as `Authorization: Bearer`, or as the URL's password for clients that take only a URL."""
    bearer = HTTPBearer(auto_error=False, description="the server's token")
    basic = HTTPBasic(auto_error=False, description="any user name, with the server's token as the password")

    def check(
        by_header: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
        by_password: Annotated[HTTPBasicCredentials | None, Depends(basic)],
    ) -> None:
        given = by_header.credentials if by_header else by_password.password if by_password else ""
        if not secrets.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "send the server's token as Authorization: Bearer", {"WWW-Authenticate": "Bearer"})

    return check


def _add_scoring(router: APIRouter, service: ScoringService) -> None:
    name, mode = service.config.name, service.config.mode

    @router.post("/score", responses=ERRORS)
    async def score(request: ScoreRequest) -> ScoreReply:
        """Score answers: `overall`, and for each tier whether the answer does what the tier asks."""
        with user_errors_as_422():
            rows = request.to_rows()
            texts = await service.encode(rows, "rows")
        scores = await service.score(texts)
        return ScoreReply(model=name, scores=[ScoredRow.of(row, s) for row, s in zip(rows, scores, strict=True)])

    @router.post("/get_reward", responses=ERRORS)
    async def get_reward(request: RewardRequest) -> RewardReply:
        """OpenRLHF's remote reward. Each label is the row as JSON."""
        with user_errors_as_422():
            rows = request.to_rows(service.special_tokens)
            texts = await service.encode(rows, "labels")
        scores = await service.score(texts)
        rewards = [combine(s, row, mode) for row, s in zip(rows, scores, strict=True)]
        logs = {label: [s.probabilities[label] for s in scores] for label in LABELS}
        return RewardReply(rewards=rewards, scores=rewards, extra_logs=logs)

    @router.post("/classify", responses=ERRORS)
    async def classify(request: ClassifyRequest) -> ClassifyReply:
        """vLLM's classification: the four labels' probabilities for rendered texts. The client sets the tiers."""
        with user_errors_as_422():
            texts = await service.tokens(request.texts(), request.add_special_tokens)
        scores, tokens = await service.score(texts), sum(map(len, texts))
        data = [_classified(index, s, request.use_activation) for index, s in enumerate(scores)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        reply_id = f"classify-{uuid.uuid4().hex}"
        return ClassifyReply(id=reply_id, created=int(time.time()), model=name, data=data, usage=usage)


def _add_health(app: FastAPI, service: ScoringService) -> None:
    @app.get("/health")
    def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "the server cannot score rows", "model": Problem}})
    def ready() -> dict[str, str]:
        """Whether the server can score rows now."""
        if not service.batcher.alive:
            raise HTTPException(503, "the scoring thread has ended; start the server again")
        return {"status": "ready", "model": service.config.name}


def _add_metrics(router: APIRouter, metrics: ServerMetrics) -> None:
    if isinstance(metrics, PrometheusMetrics):
        page = metrics.page

        @router.get("/metrics", responses={401: ERRORS[401]}, response_class=PlainTextResponse)
        def get_metrics() -> Response:
            """The server's metrics in Prometheus' text format."""
            return PlainTextResponse(page(), media_type=PROMETHEUS)


def _classified(index: int, score: Score, as_probabilities: bool) -> Classified:
    values = score.probabilities if as_probabilities else score.logits
    best = max(LABELS, key=lambda label: score.logits[label])
    return Classified(index=index, label=best, probs=[values[label] for label in LABELS], num_classes=len(LABELS))
