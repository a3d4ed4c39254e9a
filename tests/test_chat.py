"""The chat: tiers that change during a dialog, commands, and scores by tier."""

import asyncio
import json
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from asgi import Client
from rich.console import Console
from transformers import GenerationConfig

from metaalign_rl.chat import terminal
from metaalign_rl.chat.session import ChatPolicy, Reply, Session, trained_on_dialogs
from metaalign_rl.chat.web import make_app
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import write_jsonl
from metaalign_rl.core.meta_prompt import MetaPrompt
from metaalign_rl.core.rows import read_rows
from metaalign_rl.core.tokenizers import end_ids


@dataclass
class Echo:
    """A policy without a model: it repeats the message and the user tier."""

    asked: list[tuple[MetaPrompt, list[dict[str, str]]]] = field(default_factory=list)

    def answer(self, meta: MetaPrompt, messages: list[dict[str, str]], temperature: float = 0.0) -> Reply:
        self.asked.append((meta, messages))
        return Reply(f"{meta.user_info or 'nobody'} heard {messages[-1]['content']}", {"overall": 0.25})


@pytest.fixture
def session() -> Session:
    return Session(Echo())  # type: ignore[arg-type]


def chat(session: Session, *lines: str) -> str:
    """The terminal's output for these input lines."""
    console = Console(width=100, record=True, file=StringIO())
    waiting = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    terminal.run(session, read, console)
    return console.export_text()


def test_the_dialog_continues_when_the_tiers_change(session: Session) -> None:
    chat(session, "hello", "/user a baker", "and now?")
    (before, first), (after, second) = session.policy.asked  # type: ignore[attr-defined]
    assert (before.user_info, after.user_info) == ("", "a baker")
    assert second[: len(first)] == first
    assert [message["role"] for message in second] == ["user", "assistant", "user"]


def test_a_chat_can_start_a_new_dialog_with_every_message(session: Session) -> None:
    session.keep_dialog = False
    assert "--dialog" in chat(session, "hello", "and now?")
    assert [len(messages) for _, messages in session.policy.asked] == [1, 1]  # type: ignore[attr-defined]


def test_the_tiers_are_shown_at_the_start_and_after_a_change(session: Session) -> None:
    shown = chat(session, "/system be kind", "/system")
    assert shown.count("System Info") == 3
    assert "System Info be kind" in shown
    assert session.system_info == ""


def test_again_answers_the_last_message_with_the_new_tiers(session: Session) -> None:
    shown = chat(session, "/again", "hello", "/user a baker", "/again")
    assert "There is no message yet." in shown
    assert [message["content"] for message in session.messages] == ["hello", "a baker heard hello"]


def test_an_answer_is_shown_with_its_scores(session: Session) -> None:
    assert "nobody heard hello\noverall 0.25" in chat(session, "hello")


def test_clear_removes_the_dialog_and_keeps_the_tiers(session: Session) -> None:
    chat(session, "/user a baker", "hello", "/clear")
    assert (session.messages, session.user_info) == ([], "a baker")


def test_nothing_after_quit_is_read(session: Session) -> None:
    chat(session, "/quit", "hello")
    assert session.messages == []


def test_an_answer_that_fails_does_not_change_the_dialog(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    chat(session, "hello")
    before = list(session.messages)

    def fail(*_: Any) -> Reply:
        raise UserError("no room")

    monkeypatch.setattr(session.policy, "answer", fail)
    assert chat(session, "/again", "more").count("error: no room") == 2
    assert session.messages == before


@pytest.mark.parametrize(("line", "says"), [("/sytem x", "unknown command '/sytem'"), ("/temperature hot", "'hot'")])
def test_after_a_wrong_command_the_chat_continues(session: Session, line: str, says: str) -> None:
    shown = chat(session, line, "hello")
    assert says in shown
    assert "heard hello" in shown


# A real policy and reward model.


@pytest.fixture(scope="module")
def policy(tiny_run: Path) -> ChatPolicy:
    return ChatPolicy(tiny_run, max_new_tokens=16)


def test_a_runs_policy_answers_and_the_tiers_with_a_text_are_scored(policy: ChatPolicy) -> None:
    question: Any = [{"role": "user", "content": "what is the capital of france?"}]
    assert set(policy.answer(MetaPrompt(), question).scores) == {"dialog", "overall"}
    both = policy.answer(MetaPrompt("always be formal.", "please be casual."), question)
    assert set(both.scores) == {"system", "user", "dialog", "overall"}
    assert all(0 <= p <= 1 for p in both.scores.values())
    assert both.answer == policy.answer(MetaPrompt("always be formal.", "please be casual."), question).answer


def test_whether_a_policy_was_trained_on_dialogs_is_read_from_its_runs_prompts(tiny_run: Path, tmp_path: Path) -> None:
    assert not trained_on_dialogs(tiny_run)  # the world asks single questions
    assert not trained_on_dialogs(tiny_run / "policy")
    dialog = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    row = replace(next(read_rows(tiny_run / "data" / "prompts.jsonl")), messages=[*dialog, dialog[0]])
    (tmp_path / "policy").symlink_to(tiny_run / "policy")
    assert trained_on_dialogs(tmp_path)
    write_jsonl(tmp_path / "data" / "prompts.jsonl", [row.to_json()])
    assert trained_on_dialogs(tmp_path)


def test_an_answer_ends_at_every_end_token_of_the_tokenizer_and_the_generation_config(
    policy: ChatPolicy,
) -> None:
    tokenizer = policy._tokenizer
    own = end_ids(tokenizer)
    assert tokenizer.eos_token_id in own
    assert end_ids(tokenizer, GenerationConfig(eos_token_id=own[0])) == own
    other = max(own) + 1
    assert end_ids(tokenizer, GenerationConfig(eos_token_id=[other, own[0]])) == [*own, other]


def test_the_policy_stops_at_the_end_tokens_of_its_generation_config(tiny_run: Path) -> None:
    policy = ChatPolicy(tiny_run, max_new_tokens=16)
    question: Any = [{"role": "user", "content": "what is the capital of france?"}]
    whole = policy.answer(MetaPrompt(), question).answer
    first, *_ = policy._tokenizer.encode(whole, add_special_tokens=False)
    policy._model.generation_config.eos_token_id = [policy._tokenizer.eos_token_id, first]
    assert len(policy.answer(MetaPrompt(), question).answer) < len(whole)


# The page's server.


@pytest.fixture
def page_server(session: Session) -> Any:
    return make_app(session, "echo", "secret", local_only=True)


def test_the_page_and_its_answers_need_the_token(page_server: Any) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()

    async def ask(**request: Any) -> tuple[int | None, int]:
        client = Client(page_server)
        headers = {"Content-Type": "application/json", **request.pop("headers", {})}
        return await client.send(headers=headers, **request), client.parts_read

    token = {"Authorization": "Bearer secret"}
    assert asyncio.run(ask(path="/answer", headers=token, parts=[body])) == (200, 1)
    assert asyncio.run(ask(path="/answer", parts=[body])) == (401, 0)
    assert asyncio.run(ask(path="/", method="GET"))[0] == 401
    assert asyncio.run(ask(path="/answer", headers={**token, "Host": "evil.example"}, parts=[body])) == (403, 0)
    assert asyncio.run(ask(path="/answer", headers={**token, "Content-Length": str(2**20 + 1)}, parts=[body])) == (
        413,
        0,
    )


def test_the_error_of_a_folder_without_a_policy_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: expected a run's folder"):
        ChatPolicy(tmp_path)
