"""The replies to requests that get no scores."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from metaalign_rl.core.errors import UserError
from reward.serving.batcher import CannotScore, QueueFull
from reward.serving.schemas import Problem

_RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds to wait"}}
_MEANINGS: dict[int | str, str] = {
    400: "the body is not JSON",
    401: "the token is missing or wrong",
    408: "the body came too slowly",
    413: "the request, or one of its rows, is too large; the detail names the limit",
    422: "the request is malformed; the detail names the row and the field",
    429: "the queue is full; Retry-After is the number of seconds to wait",
    503: "the server cannot score now: too many large requests at a time, or its device does not work",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, "model": Problem} for status, meaning in _MEANINGS.items()
}
ERRORS[429]["headers"] = _RETRY_AFTER


class ErrorReply(JSONResponse):
    """A reply in ASCII. It may quote the request, and JSON can express text that UTF-8 cannot, such as a surrogate."""

    def render(self, content: Any) -> bytes:
        """See `Response`."""
        return json.dumps(content).encode()


def add_error_replies(app: FastAPI) -> None:
    """Answer all errors in one form, `Problem`."""

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> ErrorReply:
        return ErrorReply({"detail": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    def malformed(_: Request, error: RequestValidationError) -> ErrorReply:
        # Without FastAPI's copy of the input: it can be as long as the body, or a NaN, which JSON does not have.
        problems = [{name: problem[name] for name in ("loc", "msg", "type")} for problem in error.errors()]
        return ErrorReply({"detail": problems}, 422)

    @app.exception_handler(QueueFull)
    def full(_: Request, error: QueueFull) -> ErrorReply:
        return ErrorReply({"detail": str(error)}, 429, {"Retry-After": str(error.seconds)})

    @app.exception_handler(CannotScore)
    def broken(_: Request, error: CannotScore) -> ErrorReply:
        return ErrorReply({"detail": str(error)}, 503)


@contextmanager
def user_errors_as_422() -> Iterator[None]:
    """Turn a `UserError`, which the client can fix, into status 422 with its message."""
    try:
        yield
    except UserError as error:
        raise HTTPException(422, str(error)) from None
