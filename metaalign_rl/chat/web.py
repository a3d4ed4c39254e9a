"""The chat as a web page: two columns with a meta-prompt each, and one question to both."""

import asyncio
import secrets
from typing import Any

from metaalign_rl.chat.session import Session
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.http_guard import UVICORN, Guard
from metaalign_rl.core.meta_prompt import MetaPrompt
from metaalign_rl.core.net import is_loopback, listen, url_of
from metaalign_rl.core.request_bodies import BodyLimits
from metaalign_rl.pages.render import render

TOKEN_BYTES = 16
MOST_CHARACTERS = 20_000  # per text
LIMITS = BodyLimits(max_bytes=2**20, max_values=2**12)


def serve(start: Session, name: str, host: str, port: int) -> None:
    """Serve the page until Ctrl-C. Print its address, with the token, when it can be opened.

    Args:
        start: the policy, and the tiers and temperature that the page starts with.
        name: the policy's name on the page.

    Raises:
        UserError: the server cannot listen on the address.
    """
    import uvicorn

    token = secrets.token_urlsafe(TOKEN_BYTES)
    app, socket = make_app(start, name, token, local_only=is_loopback(host)), listen(host, port)
    print(f"open {url_of(host, port)}/?token={token} (Ctrl-C to stop)", flush=True)
    uvicorn.Server(uvicorn.Config(app, **UVICORN)).run(sockets=[socket])


def make_app(start: Session, name: str, token: str, *, local_only: bool = False) -> Any:
    """The FastAPI app: `GET /?token=…` is the page, and `POST /answer` needs the token as `Authorization: Bearer`.

    Args:
        local_only: see `Guard`.
    """
    from fastapi import Depends, FastAPI, HTTPException
    from fastapi.responses import HTMLResponse
    from pydantic import BaseModel, Field

    class Message(BaseModel):
        role: str = Field(pattern="^(user|assistant)$")
        content: str = Field(max_length=MOST_CHARACTERS)

    class Question(BaseModel):
        system_info: str = Field(default="", max_length=MOST_CHARACTERS)
        user_info: str = Field(default="", max_length=MOST_CHARACTERS)
        messages: list[Message] = Field(min_length=1, max_length=200)
        temperature: float = Field(default=0.0, ge=0.0, le=10.0)

    expected = token

    def from_address(token: str = "") -> None:
        if not secrets.compare_digest(token.encode(), expected.encode()):
            raise HTTPException(401, "the token is missing: open the address that `metaalign-rl chat --web` printed")

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    turn = asyncio.Lock()  # a question whose page is closed leaves the queue

    @app.get("/", response_class=HTMLResponse, dependencies=[Depends(from_address)])
    def page() -> str:
        return render("chat", name=name, start=start)

    @app.post("/answer")
    async def answer(question: Question) -> dict[str, Any]:
        messages = [message.model_dump() for message in question.messages]
        meta = MetaPrompt(question.system_info, question.user_info)
        try:
            async with turn:
                reply = await asyncio.to_thread(start.policy.answer, meta, messages, question.temperature)
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        return {"answer": reply.answer, "scores": dict(reply.scores)}

    app.add_middleware(Guard, tokens=[token], open_paths=("/",), local_only=local_only, limits=LIMITS)
    return app
