"""The meta-prompt: System Info and User Info above a dialog.

One Jinja chat template, saved with the tokenizer, renders it here, in transformers and in vLLM's chat server,
so nothing in this module builds text. `metaalign_rl.core.chat_template` installs it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaalign_rl.core.chat_template import (
    MARKERS,
    META_PROMPT_VERSION,
    SPECIAL_TOKENS,
    apply,
    install,
    require_installed,
)
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "MARKERS",
    "META_PROMPT_VERSION",
    "SPECIAL_TOKENS",
    "MetaPrompt",
    "encode",
    "encode_row",
    "install",
    "load_tokenizer",
]

Messages = Sequence[Mapping[str, str]]


def load_tokenizer(checkpoint: Path) -> Any:
    """A checkpoint's tokenizer, whose chat template is the meta-prompt's.

    Raises:
        UserError: it is not; call `install` and save.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    require_installed(tokenizer)
    return tokenizer


@dataclass(frozen=True)
class MetaPrompt:
    """The two tiers above the dialog. An empty tier renders to nothing."""

    system_info: str = ""
    user_info: str = ""

    def render(self, tokenizer: "PreTrainedTokenizerBase", messages: Messages, response: str | None = None) -> str:
        """The text of the meta-prompt and the dialog.

        Without `response` it ends in the generation prompt, with it in the response and the end of its turn.

        Raises:
            UserError: the tokenizer's template is not the meta-prompt's (call `install`), or a message is not
                the user's or the assistant's, holds more than role and content, or is no text.
        """
        require_installed(tokenizer)
        # An empty System Info still takes the first place, so that no message of the dialog can.
        chat = [{"role": "system", "content": self.system_info}, *map(dict, messages)]
        if response is not None:
            chat.append({"role": "assistant", "content": response})
        return apply(tokenizer, chat, self.user_info, generation_prompt=response is None)


def encode_row(
    tokenizer: "PreTrainedTokenizerBase", row: Row, *, max_tokens: int, response: str | None = None, place: str = ""
) -> list[int]:
    """Token ids of a row's meta-prompt and dialog, at most `max_tokens` of them; see `encode`.

    This is how SFT, the reward model and PPO all read a row.

    Args:
        response: ends the text with this response; without it, the text ends in the generation prompt.
        place: names the row in errors; by default its id.

    Raises:
        UserError: see `encode`.
    """
    meta = MetaPrompt(row.system_info, row.user_info)
    place = place or f"row {row.id!r}"
    return encode(tokenizer, meta, row.messages, max_tokens=max_tokens, response=response, place=place)


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    meta: MetaPrompt,
    messages: Messages,
    *,
    max_tokens: int,
    response: str | None = None,
    place: str = "",
) -> list[int]:
    """Token ids of the rendered text, at most `max_tokens` of them.

    A dialog that is too long loses its left end: the oldest messages, then the left part of the first kept
    one's text, of which a character at least stays. A cut dialog starts with a message of the user's, as many
    models' templates demand. The tiers, the response and the end of the dialog always stay.

    Raises:
        UserError: as `MetaPrompt.render`, or the tiers and the response leave no room for any of the dialog;
            it names `place`, the row.
    """

    def tokens_of(dialog: Messages) -> list[int]:
        text = meta.render(tokenizer, dialog, response)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def attempt(dialog: Messages) -> list[int] | None:
        ids = tokens_of(dialog)
        return ids if len(ids) <= max_tokens else None

    try:
        ids = attempt(messages)
        if ids is None:
            ids = _cut(messages, attempt)
        if ids is None:
            taken = len(tokens_of([{**messages[-1], "content": ""}]))
            raise UserError(
                f"max_tokens={max_tokens} leaves no room for the dialog beside the tiers"
                f"{'' if response is None else ' and the response'}, which take {taken} tokens; "
                "raise max_tokens or shorten them"
            )
    except UserError as error:
        raise UserError(f"{place}: {error}" if place else str(error)) from None
    return ids


def _cut(messages: Messages, attempt: Callable[[Messages], list[int] | None]) -> list[int] | None:
    """The ids of the longest end of the dialog that fits, or None."""
    assert messages, "a dialog has a message"
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    starts = starts or [len(messages) - 1]
    count, whole = _most(len(starts), lambda count: attempt(messages[starts[-count] :]))
    if count == len(starts):
        return whole
    first, *rest = messages[starts[-count - 1] :]
    text = first["content"].strip()
    _, cut = _most(len(text), lambda size: attempt([{**first, "content": text[-size:]}, *rest]))
    return cut or whole


def _most(limit: int, attempt: Callable[[int], list[int] | None]) -> tuple[int, list[int] | None]:
    """The largest number up to `limit` whose attempt succeeds, with its ids; (0, None) where 1 fails.

    It doubles before it bisects, so the cost follows what fits and not the length of what there is.
    """
    low, high, ids = 0, limit + 1, None
    number = 1
    while high - low > 1:
        found = attempt(number)
        if found is None:
            high = number
        else:
            low, ids = number, found
        number = (low + high) // 2 if high <= limit else min(2 * low, limit)
    return low, ids
