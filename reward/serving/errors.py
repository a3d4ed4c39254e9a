"""What is answered to a request that gets no scores."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from metaalign_rl.core.errors import UserError
from reward.serving.batcher import Busy
from reward.serving.requests import Problem

_RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds to wait"}}
_MEANINGS: dict[int | str, str] = {
    400: "no JSON",
    401: "no token, or a wrong one",
    413: "too many bytes or rows",
    422: "a malformed request; names the row and the field",
    429: "too much waits already; Retry-After says how many seconds to wait",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, "model": Problem} for status, meaning in _MEANINGS.items()
}
ERRORS[429]["headers"] = _RETRY_AFTER


class Refused(JSONResponse):
    """An answer that quotes the request in ASCII: JSON can say what UTF-8 cannot write, such as half a character."""

    def render(self, content: Any) -> bytes:
        """See `Response`."""
        return json.dumps(content).encode()


def add_errors(app: FastAPI) -> None:
    """Answer errors in one form, `Problem`."""

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> Refused:
        return Refused({"detail": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    def malformed(_: Request, error: RequestValidationError) -> Refused:
        """Without FastAPI's copy of the input, which can be all of the body, or a NaN that JSON does not know."""
        problems = [{name: problem[name] for name in ("loc", "msg", "type")} for problem in error.errors()]
        return Refused({"detail": problems}, 422)

    @app.exception_handler(Busy)
    def busy(_: Request, error: Busy) -> Refused:
        return Refused({"detail": str(error)}, 429, {"Retry-After": str(error.seconds)})


@contextmanager
def unprocessable() -> Iterator[None]:
    """What a client can mend is answered with 422 and says how."""
    try:
        yield
    except UserError as error:
        raise HTTPException(422, str(error)) from None
