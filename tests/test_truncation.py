"""Truncation: a dialog that is too long loses its left end, and never a tier, the response or its right end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_prompt_toys import assistant, hostile_texts, user
from transformers import PreTrainedTokenizerFast

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import MetaPrompt, encode, encode_answer

LONG = [user("0123456789"), assistant("abcdefghij"), user("klmnopqrst"), assistant("uvwxyz"), user("ABCDEF")]


def kept(tokenizer: PreTrainedTokenizerFast, meta: MetaPrompt, max_tokens: int, **more: str) -> str:
    ids = encode(tokenizer, meta, LONG, max_tokens=max_tokens, **more)
    assert len(ids) <= max_tokens
    return tokenizer.decode(ids)


def test_the_oldest_messages_are_dropped_first_and_then_the_left_of_a_message(installed) -> None:
    tokenizer, meta = installed["own"], MetaPrompt("S", "U")
    size = len(encode(tokenizer, meta, LONG, max_tokens=10**6))
    head = "<System Info>S<User Info>U"
    assert kept(tokenizer, meta, size).startswith(f"{head}<User>0123")
    assert kept(tokenizer, meta, size - 1).startswith(f"{head}<User>1234")
    assert kept(tokenizer, meta, size - 9).startswith(f"{head}<User>9<Assistant>abc")
    assert kept(tokenizer, meta, size - 10).startswith(f"{head}<User>klmnopqrst<Assistant>uvw")
    assert kept(tokenizer, meta, 12) == f"{head}<User>ABCDEF<Assistant>"
    assert kept(tokenizer, meta, 10, response="R") == f"{head}<User>EF<Assistant>R<eos>"


def test_the_error_of_tiers_that_leave_no_room_for_the_dialog_names_the_place(installed) -> None:
    tokenizer, meta = installed["own"], MetaPrompt("S", "U")
    smallest = len(encode(tokenizer, meta, [user("F")], max_tokens=100))
    assert kept(tokenizer, meta, smallest) == "<System Info>S<User Info>U<User>F<Assistant>"
    with pytest.raises(UserError, match=rf"^rows.jsonl:3: .*max_tokens={smallest - 1} .*no room for the dialog"):
        encode(tokenizer, meta, LONG, max_tokens=smallest - 1, place="rows.jsonl:3")
    with pytest.raises(UserError, match="for the dialog: the tiers and the response take"):
        encode(tokenizer, meta, LONG, max_tokens=20, response="a long response", place="rows.jsonl:3")


def test_an_empty_last_message_needs_room_for_its_marker(installed) -> None:
    size = len(encode(installed["own"], MetaPrompt("S"), [user("")], max_tokens=100))
    assert len(encode(installed["own"], MetaPrompt("S"), [user("long"), user("")], max_tokens=size)) == size
    with pytest.raises(UserError, match="no room"):
        encode(installed["own"], MetaPrompt("S"), [user("")], max_tokens=size - 1)


def test_a_cut_dialog_starts_with_the_user_as_some_templates_require(installed) -> None:
    tokenizer = installed["llama2"]  # raises unless user and assistant alternate, with the user first
    for limit in range(60, len(encode(tokenizer, MetaPrompt("S"), LONG, max_tokens=10**6))):
        text = tokenizer.decode(encode(tokenizer, MetaPrompt("S"), LONG, max_tokens=limit))
        assert "<System Info>\nS\n<</SYS>>" in text
        assert text.endswith("ABCDEF [/INST]")


def test_the_tokens_of_an_answer_say_whether_the_dialog_was_cut(installed) -> None:
    row = Row(
        id="1", family="helpful", relation="neutral", tier="dialog", system_info="S", user_info="U", messages=LONG
    )  # fmt: skip
    size = len(encode_answer(installed["own"], row, "R", max_tokens=10**6).ids)
    assert not encode_answer(installed["own"], row, "R", max_tokens=size).truncated
    for limit in (size - 1, size - 12):  # a part of a message, and messages
        assert encode_answer(installed["own"], row, "R", max_tokens=limit).truncated


def test_a_row_that_fits_is_rendered_once(installed, monkeypatch: pytest.MonkeyPatch) -> None:
    renders = []
    tokenizer = installed["own"]
    real = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: renders.append(a) or real(*a, **k))
    encode(tokenizer, MetaPrompt("S"), LONG, max_tokens=500)
    assert len(renders) == 1


dialogs = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), hostile_texts), max_size=4).map(
    lambda turns: [{"role": role, "content": text} for role, text in turns]
)


@pytest.mark.parametrize("name", ["own", "chatml"])
@settings(max_examples=150, deadline=None)
@given(
    turns=dialogs,
    last=hostile_texts,
    info=hostile_texts,
    response=st.none() | hostile_texts,
    limit=st.integers(1, 300),
)
def test_truncation_keeps_the_tiers_the_response_and_the_end_of_the_dialog(
    installed, name: str, turns: list[dict[str, str]], last: str, info: str, response: str | None, limit: int
) -> None:
    tokenizer, meta, dialog = installed[name], MetaPrompt("be brief", info), [*turns, user(last)]

    def whole(messages: list[dict[str, str]]) -> list[int]:
        return tokenizer.encode(meta.render(tokenizer, messages, response), add_special_tokens=False)

    def ends() -> list[list[dict[str, str]]]:
        """Every dialog that may remain after a cut, the longest first."""
        found = [dialog]
        for index, message in enumerate(dialog):
            if message["role"] == "user":
                text = message["content"].strip()
                found.append(dialog[index:])
                found += [[user(text[cut:]), *dialog[index + 1 :]] for cut in range(len(text))]
        return found

    if len(whole([user(last.strip()[-1:])])) > limit:
        with pytest.raises(UserError, match=r"^row 1: max_tokens"):
            encode(tokenizer, meta, dialog, max_tokens=limit, response=response, place="row 1")
    else:
        ids = encode(tokenizer, meta, dialog, max_tokens=limit, response=response, place="row 1")
        assert len(ids) <= limit
        assert ids in (whole(messages) for messages in ends())


@settings(max_examples=100, deadline=None)
@given(limit=st.integers(14, 70))
def test_truncation_keeps_as_many_characters_as_fit(installed, limit: int) -> None:
    tokenizer, meta = installed["own"], MetaPrompt("S", "U")
    ids = encode(tokenizer, meta, LONG, max_tokens=limit)
    ends = [
        [user(message["content"][cut:]), *LONG[index + 1 :]]
        for index, message in enumerate(LONG)
        if message["role"] == "user"
        for cut in range(len(message["content"]))
    ]
    sizes = [len(encode(tokenizer, meta, end, max_tokens=10**6)) for end in ends]
    assert len(ids) == max(size for size in sizes if size <= limit)
