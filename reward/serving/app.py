"""The HTTP app: it scores through a batcher, with limits and a token."""

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Response
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBasic, HTTPBearer

from metaalign_rl.core.dataflow import LABELS
from metaalign_rl.core.http_guard import Guard
from reward.score import Score, combine, require_trained
from reward.scorer import Scorer
from reward.serving.config import ServingConfig
from reward.serving.error_replies import ERRORS, add_error_replies, user_errors_as_422
from reward.serving.middleware import RequestMetrics
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
from reward.serving.service import Scored, ScoringService

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
PUBLIC = ("/health", "/ready", "/openapi.json")  # without a token: for the process's supervisor, and a constant

# `Guard` checks the token, before FastAPI sees the request. These only describe it in /openapi.json.
_SECURITY = [
    Depends(HTTPBearer(auto_error=False, description="the server's token")),
    Depends(HTTPBasic(auto_error=False, description="any user name, with the server's token as the password")),
]

__all__ = ["ServingConfig", "create_app"]


def create_app(scorer: Scorer, config: ServingConfig, metrics: ServerMetrics | None = None) -> FastAPI:
    """The app.

    Args:
        metrics: receives the server's metrics. Default: `PrometheusMetrics`, which the app serves at `/metrics`.

    Raises:
        UserError: the model was not trained for `config.mode`.
    """
    metrics = metrics or PrometheusMetrics()
    require_trained(config.mode, ("overall",) if config.mode == "overall" else ("dialog",), scorer.untrained)
    service = ScoringService(scorer, config, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.batcher.stop()

    app = FastAPI(title="metaalign-reward", lifespan=lifespan, docs_url=None, redoc_url=None)
    add_error_replies(app)
    guarded = APIRouter(dependencies=_SECURITY if config.token else [])
    paths = [*PUBLIC, *_add_scoring(guarded, service), *_add_metrics(guarded, metrics)]
    app.include_router(guarded)
    _add_health(app, service)
    app.add_middleware(
        Guard,
        tokens=[config.token] if config.token else [],
        open_paths=PUBLIC,
        local_only=config.local_only,
        limits=config.body_limits,
    )
    app.add_middleware(RequestMetrics, metrics=metrics, paths=paths)
    return app


def _add_scoring(router: APIRouter, service: ScoringService) -> list[str]:
    """Add the requests that score; returns their paths."""
    name, mode = service.config.name, service.config.mode
    untrained = [label for label in LABELS if label in service.scorer.untrained]

    @router.post("/score", responses=ERRORS)
    async def score(request: ScoreRequest) -> ScoreReply:
        """Score answers: `overall`, and for each tier whether the answer does what the tier asks."""
        found = await _score_rows(service, request)
        rows = [ScoredRow.of(one.row, one.score) for one in found if one.row is not None]
        return ScoreReply(model=name, scores=rows, untrained=untrained)

    @router.post("/get_reward", responses=ERRORS)
    async def get_reward(request: RewardRequest) -> RewardReply:
        """OpenRLHF's remote reward. Each label is the row as JSON."""
        found = await _score_labels(service, request)
        with user_errors_as_422():
            rewards = [combine(one.score, one.row, mode) for one in found if one.row is not None]
        logs = {label: [one.score.probabilities[label] for one in found] for label in LABELS}
        truncated = [one.score.truncated for one in found]
        return RewardReply(rewards=rewards, scores=rewards, extra_logs=logs, truncated=truncated)

    @router.post("/classify", responses=ERRORS)
    async def classify(request: ClassifyRequest) -> ClassifyReply:
        """vLLM's classification: the four labels' probabilities for rendered texts. The client sets the tiers."""
        found = await _score_texts(service, request)
        data = [_classified(index, one.score, request.use_activation) for index, one in enumerate(found)]
        tokens = sum(one.tokens for one in found)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        reply_id = f"classify-{uuid.uuid4().hex}"
        return ClassifyReply(id=reply_id, created=int(time.time()), model=name, data=data, usage=usage)

    return ["/score", "/get_reward", "/classify"]


async def _score_rows(service: ScoringService, request: ScoreRequest) -> list[Scored]:
    service.check_number(len(request.rows), "rows")
    jobs = [
        service.row_job(row.characters, len(row.messages), partial(request.row, index), f"rows[{index}]")
        for index, row in enumerate(request.rows)
    ]
    return await service.score(jobs)


async def _score_labels(service: ScoringService, request: RewardRequest) -> list[Scored]:
    service.check_number(len(request.labels), "labels")
    with user_errors_as_422():
        request.check()
    specials, mode = service.special_tokens, service.config.mode
    jobs = [
        service.row_job(request.characters(index), 0, partial(request.row, index, specials, mode), f"labels[{index}]")
        for index in range(len(request.labels))
    ]
    return await service.score(jobs)


async def _score_texts(service: ScoringService, request: ClassifyRequest) -> list[Scored]:
    texts = request.texts()
    service.check_number(len(texts), "input")
    jobs = [service.text_job(text, request.add_special_tokens, f"input[{index}]") for index, text in enumerate(texts)]
    return await service.score(jobs)


def _add_health(app: FastAPI, service: ScoringService) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "the server cannot score rows", "model": Problem}})
    async def ready() -> dict[str, str]:
        """Whether the server can score rows now."""
        if service.batcher.problem:
            raise HTTPException(503, f"{service.batcher.problem}; start the server again")
        return {"status": "ready", "model": service.config.name}


def _add_metrics(router: APIRouter, metrics: ServerMetrics) -> list[str]:
    """Add /metrics, if these metrics are read there; returns its path."""
    if not isinstance(metrics, PrometheusMetrics):
        return []

    @router.get("/metrics", responses={401: ERRORS[401]}, response_class=PlainTextResponse)
    async def get_metrics() -> Response:
        """The server's metrics in Prometheus' text format."""
        return PlainTextResponse(metrics.page(), media_type=PROMETHEUS)

    return ["/metrics"]


def _classified(index: int, score: Score, as_probabilities: bool) -> Classified:
    values = score.probabilities if as_probabilities else score.logits
    best = max(LABELS, key=lambda label: score.logits[label])
    return Classified(index=index, label=best, probs=[values[label] for label in LABELS], num_classes=len(LABELS))
