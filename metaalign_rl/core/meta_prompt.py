"""The meta-prompt: System Info and User Info above a dialog.

A Jinja chat template renders it. The template is saved with the tokenizer, so that this module, transformers and
vLLM's chat server all render the same text. `metaalign_rl.core.chat_template` installs the template.
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
    """The tokenizer of a checkpoint that has the meta-prompt's chat template.

    Raises:
        UserError: the chat template is another one, or of another version.
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


def encode_row(
    tokenizer: "PreTrainedTokenizerBase", row: Row, *, max_tokens: int, response: str | None = None, place: str = ""
) -> list[int]:
    """Token ids of a row's meta-prompt and dialog, at most `max_tokens`; see `encode`.

    SFT, the reward model and PPO all read a row in this way.

    Args:
        response: the text ends with this response; without one, with the generation prompt.
        place: names the row in errors; by default with its id.

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
                f"max_tokens={max_tokens} leaves no room for the dialog: the tiers"
                f"{'' if response is None else ' and the response'} take {taken} tokens; "
                "raise max_tokens or shorten them"
            )
    except UserError as error:
        raise UserError(f"{place}: {error}" if place else str(error)) from None
    return ids


def _cut(messages: Messages, attempt: Callable[[Messages], list[int] | None]) -> list[int] | None:
    """The ids of the longest end of the dialog that fits; None if no end fits."""
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


def _most(limit: int, attempt: Callable[[int], list[int] | None]) -> tuple[int, list[int] | None]:
    """The largest number up to `limit` whose attempt succeeds, with its ids; (0, None) if 1 fails.

    It doubles the number, then bisects. So the cost depends on the length that fits, not on the dialog's length.
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
