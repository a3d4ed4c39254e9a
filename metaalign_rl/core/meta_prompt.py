"""The meta-prompt: System Info and User Info above a dialog.

A Jinja chat template renders it. The template is saved with the tokenizer, so that this module, transformers and
vLLM's chat server all render the same text. `metaalign_rl.core.chat_template` installs the template.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from metaalign_rl.core.chat_template import (
    MARKERS,
    META_PROMPT_VERSION,
    SPECIAL_TOKENS,
    install,
    require_installed,
)
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.template_probe import apply, read_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "MARKERS",
    "META_PROMPT_VERSION",
    "SPECIAL_TOKENS",
    "AnswerTokens",
    "MetaPrompt",
    "encode",
    "encode_answer",
    "encode_row",
    "install",
    "retokenized",
    "without_reasoning",
]

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class MetaPrompt:
    """The two tiers above the dialog. An empty tier renders to nothing."""

    system_info: str = ""
    user_info: str = ""

    def render(self, tokenizer: "PreTrainedTokenizerBase", messages: Messages, response: str | None = None) -> str:
        """The text of the meta-prompt and the dialog.

        Without `response`, it ends with the generation prompt. With `response`, it ends with the response and the end
        of its turn.

        Raises:
            UserError: the tokenizer's template is not the meta-prompt's (call `install`); or a message has a role
                other than `user` and `assistant`, a field other than role and content, or a content that is not text.
        """
        require_installed(tokenizer)
        # Also if it is empty. Otherwise a system message at the start of the dialog would become System Info.
        chat = [{"role": "system", "content": self.system_info}, *map(dict, messages)]
        if response is not None:
            chat.append({"role": "assistant", "content": response})
        return apply(tokenizer, chat, self.user_info, generation_prompt=response is None)


def without_reasoning(response: str) -> str:
    """The answer in a reasoning model's response: the text after `</think>`; empty if the reasoning has no end."""
    _, end, answer = response.rpartition("</think>")
    return "" if not end and answer.lstrip().startswith("<think>") else answer.strip()


def retokenized(
    tokenizer: "PreTrainedTokenizerBase", responses: Sequence[Sequence[int]], texts: Sequence[str]
) -> list[bool]:
    """Whether the text of each sampled response has other tokens than were sampled, when it is encoded again.

    The reward model reads the tokens of the text.

    Args:
        responses: the sampled tokens; special tokens do not count.
    """
    turn, special = read_turn(tokenizer), set(tokenizer.all_special_ids)
    anchored = [f"{turn.end}{turn.lead}{text}" for text in texts]  # see _tokens_after
    encoded = tokenizer(anchored, add_special_tokens=False)["input_ids"] if anchored else []
    pairs = zip(responses, encoded, strict=True)
    return [[i for i in ids if i not in special] != [i for i in again if i not in special] for ids, again in pairs]


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """Token ids of a rendered text, `ids`. The answer with its end of turn is `ids[start:end]`.

    The tokens before `start` are those of the prompt alone. So SFT and the reward model read the tokens that the policy
    sees in PPO. Some templates write more after the end of a turn, such as a line break.

    Attributes:
        truncated: the dialog was too long, and its beginning was cut off.
    """

    ids: list[int]
    start: int
    end: int
    truncated: bool = False


def encode_row(tokenizer: "PreTrainedTokenizerBase", row: Row, *, max_tokens: int, place: str = "") -> list[int]:
    """Token ids of a row's meta-prompt, its dialog and the generation prompt, at most `max_tokens`; see `encode`.

    Args:
        place: names the row in errors; by default with its id.

    Raises:
        UserError: see `encode`.
    """
    meta = MetaPrompt(row.system_info, row.user_info)
    return encode(tokenizer, meta, row.messages, max_tokens=max_tokens, place=place or f"row {row.id!r}")


def encode_answer(
    tokenizer: "PreTrainedTokenizerBase", row: Row, response: str, *, max_tokens: int, place: str = ""
) -> AnswerTokens:
    """Token ids of a row's meta-prompt, its dialog and a response, at most `max_tokens`; see `encode`.

    SFT, the reward model and PPO all read a row with a response in this way. Reasoning before `</think>` is left out if
    the model's template has it.

    Args:
        place: names the row in errors; by default with its id.

    Raises:
        UserError: see `encode`; or the tokenizer has no exact tokens for the response after the prompt.
    """
    meta = MetaPrompt(row.system_info, row.user_info)
    return _encode(tokenizer, meta, row.messages, max_tokens, response, place or f"row {row.id!r}")


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    meta: MetaPrompt,
    messages: Messages,
    *,
    max_tokens: int,
    response: str | None = None,
    place: str = "",
) -> list[int]:
    """Token ids of the rendered text, at most `max_tokens`.

    A dialog that is too long is cut on the left:

    - First the oldest messages are dropped, then the beginning of the first message that is kept. At least one
      character of that message stays.
    - A cut dialog begins with a message of the user, as many models' templates require.
    - The tiers, the response and the end of the dialog are never cut.

    Args:
        response: see `MetaPrompt.render`.
        place: names the row in errors.

    Raises:
        UserError: see `MetaPrompt.render`; or the tiers and the response leave no room for the dialog.
    """
    return _encode(tokenizer, meta, messages, max_tokens, response, place).ids


def _encode(
    tokenizer: "PreTrainedTokenizerBase",
    meta: MetaPrompt,
    messages: Messages,
    max_tokens: int,
    response: str | None,
    place: str,
) -> AnswerTokens:
    def tokens_of(dialog: Messages) -> AnswerTokens:
        text = meta.render(tokenizer, dialog, response)
        if response is not None:
            return _answer_tokens(tokenizer, text)
        ids = _tokens(tokenizer, text)
        return AnswerTokens(ids, len(ids), len(ids))

    def attempt(dialog: Messages) -> AnswerTokens | None:
        found = tokens_of(dialog)
        return found if len(found.ids) <= max_tokens else None

    try:
        if (found := attempt(messages)) is not None:
            return found
        if (found := _cut(messages, attempt)) is None:
            taken = len(tokens_of([{**messages[-1], "content": ""}]).ids)
            raise UserError(
                f"max_tokens={max_tokens} leaves no room for the dialog: the tiers"
                f"{'' if response is None else ' and the response'} take {taken} tokens; "
                "raise max_tokens or shorten them"
            )
    except UserError as error:
        raise UserError(f"{place}: {error}" if place else str(error)) from None
    return replace(found, truncated=True)


def _tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def _answer_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> AnswerTokens:
    turn = read_turn(tokenizer)
    boundary = text.rindex(turn.prompt) + len(turn.prompt)
    prompt, ids = _tokens(tokenizer, text[:boundary]), _tokens(tokenizer, text)
    end_id = tokenizer.convert_tokens_to_ids(turn.end)
    if ids[: len(prompt)] != prompt:  # a token spans the boundary: the policy could not have sampled it
        ids = prompt + _tokens_after(tokenizer, turn.end, text[boundary:])
    return AnswerTokens(ids, len(prompt), ids.index(end_id, len(prompt)) + 1)


def _tokens_after(tokenizer: "PreTrainedTokenizerBase", anchor: str, text: str) -> list[int]:
    """Token ids of a text that follows other text: some tokenizers begin a text with a space of their own."""
    ids = _tokens(tokenizer, f"{anchor}{text}")
    ids = ids[ids.index(tokenizer.convert_tokens_to_ids(anchor)) + 1 :]
    found = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if found != text:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r}: expected tokens for {text!r}, found those of {found!r}")
    return ids


def _cut(messages: Messages, attempt: Callable[[Messages], AnswerTokens | None]) -> AnswerTokens | None:
    """The tokens of the longest end of the dialog that fits; None if no end fits."""
    assert messages, "a dialog has a message"
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    starts = starts or [len(messages) - 1]
    count, kept = _most(len(starts), lambda count: attempt(messages[starts[-count] :]))
    if count == len(starts):
        return kept
    first, *rest = messages[starts[-count - 1] :]
    text = first["content"].strip()
    _, cut = _most(len(text), lambda size: attempt([{**first, "content": text[-size:]}, *rest]))
    return cut or kept


def _most(limit: int, attempt: Callable[[int], AnswerTokens | None]) -> tuple[int, AnswerTokens | None]:
    """The largest number up to `limit` whose attempt succeeds, with its tokens; (0, None) if 1 fails.

    It doubles the number, then bisects. So the cost depends on the length that fits, not on the dialog's length.
    """
    low, high, tokens = 0, limit + 1, None
    number = 1
    while high - low > 1:
        found = attempt(number)
        if found is None:
            high = number
        else:
            low, tokens = number, found
        number = (low + high) // 2 if high <= limit else min(2 * low, limit)
    return low, tokens
