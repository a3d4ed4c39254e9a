"""Renders probe texts through a chat template to find what it writes around them."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from metaalign_rl.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TIER_MARKERS = {"system": "<System Info>", "user": "<User Info>"}
DIALOG_MARKER = "<Dialog>"  # ends the tiers where the model's own template does not

_SYSTEM_INFO, _USER_INFO = "metaalign0system0info", "metaalign0user0info"
_QUESTION, _ANSWER = "metaalign0question", "metaalign0answer"
_SECOND_QUESTION, _RESPONSE = "metaalign0second0question", "metaalign0response"
_WORDS = re.compile("|".join([_USER_INFO, _SYSTEM_INFO, _QUESTION, _ANSWER, _SECOND_QUESTION, _RESPONSE]))
_DIALOG = [
    {"role": "user", "content": _QUESTION},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _SECOND_QUESTION},
    {"role": "assistant", "content": _RESPONSE},
]
_CONTROL_TOKEN = re.compile(r"<[|\uff5c].+[|\uff5c]>")  # some models use the full-width bar
_OPEN_REASONING = re.compile(r"<think>\s*$")
_CLOSE_REASONING = "\n</think>\n\n"


@dataclass(frozen=True, slots=True)
class TurnFormat:
    """What the meta-prompt adds to a model's own template.

    Attributes:
        in_first_message: the tiers are in the first message of the user, because the model has no system message.
        closing: follows the tiers.
        opening: follows the model's generation prompt. It is what the model's template writes before an answer.
        lead, after: the text before and after an answer. `after` holds the end of the turn.
    """

    in_first_message: bool
    closing: str
    opening: str
    lead: str
    after: str


@dataclass(frozen=True, slots=True)
class Turn:
    """The installed template's text around an answer.

    Attributes:
        prompt: the text from the end of the user's message to the answer. It is not part of any message.
        lead: white space that the model writes before the answer.
        end: the token that ends the answer's turn.
    """

    prompt: str
    lead: str
    end: str


def apply(
    tokenizer: "PreTrainedTokenizerBase",
    chat: list[dict[str, str]],
    user_info: str,
    *,
    generation_prompt: bool,
    template: str | None = None,
) -> str:
    """The text that `template`, by default the tokenizer's, renders.

    Raises:
        UserError: the template raised an exception.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            chat,
            chat_template=template,
            user_info=user_info,
            add_generation_prompt=generation_prompt,
            tokenize=False,
        )
    except (TemplateError, TypeError) as error:  # TypeError: a template that adds to a missing text
        raise UserError(str(error)) from None
    assert isinstance(text, str)
    return text


def joints(tokenizer: "PreTrainedTokenizerBase", template: str) -> list[str]:
    """The text that an installed template writes before, between and after the texts of a dialog.

    The last element is the text from the last question to the answer.

    Raises:
        UserError: the template refuses the dialog or does not render each text once.
    """
    chat = [{"role": "system", "content": _SYSTEM_INFO}, *_DIALOG]
    full, prompt = _render(tokenizer, template, chat, _USER_INFO)
    return [*_WORDS.split(full), _WORDS.split(prompt)[-1]]


def read_format(
    tokenizer: "PreTrainedTokenizerBase", original: str, literals_in: Callable[[str], Collection[str]]
) -> TurnFormat:
    """Find out how a model's own template can hold the tiers and an answer.

    Args:
        literals_in: the strings in a template's text that no message can contain.

    Raises:
        UserError: neither a system message nor the first message can hold the tiers, nothing separates an answer from
            the message before it, or nothing ends an answer.
    """
    in_first_message, full, prompt = _place_tiers(tokenizer, original)
    after_tiers = _between(full, _USER_INFO)
    closing = "" if literals_in(after_tiers) and not in_first_message else f"\n{DIALOG_MARKER}"
    generation_prompt, before, after = (
        _WORDS.split(prompt)[-1],
        _between(full, _SECOND_QUESTION),
        _between(full, _RESPONSE),
    )
    opening, lead = _opening(generation_prompt, before)
    if not literals_in(generation_prompt + opening):
        raise refusal(tokenizer, "nothing in its chat template separates an answer from the message before it")
    if not any(token in after for token in special_tokens(tokenizer)):
        if not tokenizer.eos_token:
            raise refusal(tokenizer, "no special token ends an answer, and it has no end token (eos_token)")
        after = f"{tokenizer.eos_token}{after}"
    return TurnFormat(in_first_message, closing, opening, lead, after)


def read_turn(tokenizer: "PreTrainedTokenizerBase") -> Turn:
    """The text around an answer in the tokenizer's installed template."""
    return _read_turn(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=16)
def _read_turn(tokenizer: Any, template: str) -> Turn:
    *_, before, after, prompt = joints(tokenizer, template)
    ends = {after.find(token): token for token in special_tokens(tokenizer) if token in after}
    return Turn(prompt, before.removeprefix(prompt), ends[min(ends)])


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """The added tokens that are special, or look it.

    Other added tokens are words of the vocabulary (line breaks, HTML tags).
    """
    added = tokenizer.added_tokens_decoder.values()
    return [token for token in added if token.special or _CONTROL_TOKEN.fullmatch(token.content)]


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The texts that become control tokens."""
    return {token.content for token in control_tokens(tokenizer)} | set(tokenizer.all_special_tokens)


def refusal(tokenizer: "PreTrainedTokenizerBase", reason: str) -> UserError:
    """The error for a chat template that cannot be used."""
    return UserError(
        f"tokenizer {tokenizer.name_or_path!r}: {reason}; set tokenizer.chat_template to a template that can be used, "
        "or to None for the project's own format"
    )


def _place_tiers(tokenizer: "PreTrainedTokenizerBase", original: str) -> tuple[bool, str, str]:
    """Whether the tiers must be in the first message, and the probe rendered with and without its last answer."""
    tiers = f"{TIER_MARKERS['system']}\n{_SYSTEM_INFO}\n{TIER_MARKERS['user']}\n{_USER_INFO}"
    try:
        return False, *_render(tokenizer, original, [{"role": "system", "content": tiers}, *_DIALOG])
    except UserError as error:
        reason = error
    first = {"role": "user", "content": f"{tiers}\n{DIALOG_MARKER}\n{_QUESTION}"}
    try:
        return True, *_render(tokenizer, original, [first, *_DIALOG[1:]])
    except UserError:
        raise reason from None


def _render(
    tokenizer: "PreTrainedTokenizerBase", template: str, chat: list[dict[str, str]], user_info: str = ""
) -> tuple[str, str]:
    """The probe dialog with its last answer, and without it but with the generation prompt."""
    try:
        full = apply(tokenizer, chat, user_info, generation_prompt=False, template=template)
        prompt = apply(tokenizer, chat[:-1], user_info, generation_prompt=True, template=template)
    except UserError as error:
        raise refusal(tokenizer, f"its chat template refuses a dialog with a system message ({error})") from None
    words = [_SYSTEM_INFO, _USER_INFO, *(message["content"] for message in _DIALOG)]
    lost = [word for word in words if full.count(word) != 1 or prompt.count(word) != (word != _RESPONSE)]
    if lost:
        raise refusal(
            tokenizer,
            f"its chat template does not render each text once (lost or repeated: {', '.join(lost)}), so the tiers "
            "would not reach the model",
        )
    return full, prompt


def _between(text: str, word: str) -> str:
    """The text from a probe word to the next one."""
    return _WORDS.split(text.partition(word)[2])[0]


def _opening(generation_prompt: str, before: str) -> tuple[str, str]:
    """What the generation prompt lacks, and the white space that the model writes itself before an answer."""
    if before.startswith(generation_prompt):
        rest = before.removeprefix(generation_prompt)
        return ("", rest) if rest.strip(" ") == "" else (rest, "")
    return (_CLOSE_REASONING, "") if _OPEN_REASONING.search(generation_prompt) else ("", "")
