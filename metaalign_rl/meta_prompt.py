"""The meta-prompt: System Info and User Info above a dialog, rendered by one chat template saved with the tokenizer.

transformers, vLLM's chat server and this module render the same Jinja template, so nothing here builds text. The
template also keeps a lower tier's text from forging a higher tier: `install` embeds in it every string that structures
the text, and inside a tier, a message or a response each of them gets a dot behind its first character.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from metaalign_rl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

META_PROMPT_VERSION = 1
MARKERS = {"system": "<System Info>", "user": "<User Info>"}
TURN_MARKERS = ("<User>", "<Assistant>")
SPECIAL_TOKENS = ("<pad>", "<eos>", *MARKERS.values(), *TURN_MARKERS)
DOT = "·"  # U+00B7, what parts a forged literal

Messages = Sequence[Mapping[str, str]]

_FAMILY_HEADER = "{#- metaalign-rl meta-prompt, version "
_HEADER = f"{_FAMILY_HEADER}{META_PROMPT_VERSION} -#}}"
_BOUNDARY = "{#- metaalign-rl: the model's own template follows #}\n"  # trim_blocks drops this one line break
_BRACKETED = re.compile(r"<{1,2}[^\s<>{}'\"]+>{1,2}|\[/?[A-Z][A-Z_]+\]")  # <|im_end|>, </s>, <<SYS>>, [/INST]
_PROBES = {name: f"metaalign0{name}0probe" for name in ("system", "user", "question", "answer", "again", "final")}


@dataclass(frozen=True)
class MetaPrompt:
    """The two tiers above the dialog. An empty tier renders to nothing."""

    system_info: str = ""
    user_info: str = ""

    def render(self, tokenizer: "PreTrainedTokenizerBase", messages: Messages, response: str | None = None) -> str:
        """The text of the meta-prompt and the dialog.

        Without `response` it ends in the generation prompt, with it in the response and the end of its turn.

        Raises:
            UserError: the tokenizer's template is not this module's (call `install`), the dialog holds a system
                message or another role, or a text is not a string.
        """
        _require_installed(tokenizer)
        chat = [{"role": "system", "content": self.system_info}, *messages]
        if response is not None:
            chat.append({"role": "assistant", "content": response})
        return _apply(tokenizer, chat, self.user_info, tokenizer.chat_template, generate=response is None)


def install(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Set `tokenizer.chat_template` to the meta-prompt's; call it after the last token was added, then save.

    A tokenizer without a template gets the own format, whose markers it must hold as special tokens
    (`SPECIAL_TOKENS`). Any other keeps its template: the tiers go, in plain text, into its system message. A second
    call changes nothing; on a template of another version it brings the template up to date.

    Raises:
        UserError: a marker is not a special token, a special token cannot be told from ordinary text, or the model's
            template loses the system message or joins messages in a way that lets two of them form a marker.
    """
    original = _original_template(tokenizer)
    specials = _special_tokens(tokenizer)
    if original is None:
        _require_own_tokens(tokenizer, specials)
        template = _own_template(specials, tokenizer.eos_token)
        joints = _joints(tokenizer, template)
    else:
        specials |= set(MARKERS.values())
        literals = specials | set(_BRACKETED.findall(original))
        joints = _joints(tokenizer, _wrapped_template(literals, original))
        specials = literals | _plain_literals(joints)
        template = _wrapped_template(specials, original)
    _check_joints(specials, joints)
    tokenizer.chat_template = template


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

    A dialog that is too long loses its left end: the oldest messages, then the left part of the text of the first
    kept one. The kept dialog starts with a message of the user's, as many models' templates demand; one that is cut
    keeps at least a character. The tiers, the response and the dialog's last character always stay.

    Raises:
        UserError: as `MetaPrompt.render`, or the tiers and the response leave no room for any of the dialog; it
            names `place`, the row.
    """

    def tokens_of(dialog: Messages) -> list[int]:
        return tokenizer.encode(meta.render(tokenizer, dialog, response), add_special_tokens=False, verbose=False)

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
                f"the meta-prompt{' and the response take' if response is not None else ' takes'} {taken} of "
                f"max_tokens={max_tokens} and leave no room for the dialog; raise max_tokens or shorten them"
            )
    except UserError as error:
        raise UserError(f"{place}: {error}" if place else str(error)) from None
    return ids


def _cut(messages: Messages, attempt: Callable[[Messages], list[int] | None]) -> list[int] | None:
    """The ids of the longest end of the dialog that fits, or None."""
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"] or [len(messages) - 1]
    whole = bisect_left(starts, True, key=lambda start: attempt(messages[start:]) is not None)
    if whole > 0:
        first, *rest = messages[starts[whole - 1] :]
        ids = _longest_end(first["content"].strip(), lambda text: attempt([{**first, "content": text}, *rest]))
        if ids is not None:
            return ids
    return attempt(messages[starts[whole] :]) if whole < len(starts) else None


def _longest_end(text: str, attempt: Callable[[str], list[int] | None]) -> list[int] | None:
    best, low, high = None, 1, len(text)
    while low <= high:
        middle = (low + high) // 2
        ids = attempt(text[-middle:])
        if ids is None:
            high = middle - 1
        else:
            best, low = ids, middle + 1
    return best


def _apply(
    tokenizer: "PreTrainedTokenizerBase", chat: Messages, user_info: str, template: str, *, generate: bool
) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            chat, chat_template=template, user_info=user_info, add_generation_prompt=generate, tokenize=False
        )
    except TemplateError as error:
        raise UserError(str(error)) from None
    assert isinstance(text, str)
    return text


def _require_installed(tokenizer: "PreTrainedTokenizerBase") -> None:
    template = tokenizer.chat_template
    if isinstance(template, str) and template.startswith(_HEADER):
        return
    found = "of another version" if isinstance(template, str) and template.startswith(_FAMILY_HEADER) else "not ours"
    raise UserError(
        f"tokenizer {tokenizer.name_or_path!r}: its chat template is {found}; "
        f"call metaalign_rl.meta_prompt.install(tokenizer) for version {META_PROMPT_VERSION}"
    )


def _original_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r}: it has several chat templates ({', '.join(template)}); "
            "set tokenizer.chat_template to the one to keep"
        )
    if template is None or not template.startswith(_FAMILY_HEADER):
        return template
    _, boundary, original = template.partition(_BOUNDARY)
    return original if boundary else None


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The special tokens' texts, each of which must be distinguishable from ordinary text."""
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    specials = {token.content for token in added} | set(tokenizer.all_special_tokens)
    for text in sorted(specials):
        if len(text) < 2 or DOT in text:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r}: special token {text!r} cannot be told from ordinary text; "
                f"use one of two characters or more, without {DOT!r}"
            )
    for token in added:
        if token.normalized and _normalizer_can_make(tokenizer, token.content):
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r}: special token {token.content!r} is matched in normalized text, "
                'where other characters can spell it; set its "normalized" to false in tokenizer.json'
            )
    return specials


def _normalizer_can_make(tokenizer: "PreTrainedTokenizerBase", token: str) -> bool:
    """Whether some other character becomes one of the token's, or nothing, when the tokenizer normalizes text."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None:
        return False
    frame = normalizer.normalize_str("xx")  # what is put in front or behind does not matter, hence the two x
    for code in (*range(0xD800), *range(0xE000, 0x10000)):
        middle = normalizer.normalize_str(f"x{chr(code)}x")
        if middle != frame.replace("xx", f"x{chr(code)}x") and (middle == frame or (set(middle) - {"x"}) & set(token)):
            return True
    return False


def _require_own_tokens(tokenizer: "PreTrainedTokenizerBase", specials: set[str]) -> None:
    missing = [token for token in (*MARKERS.values(), *TURN_MARKERS) if token not in specials]
    if missing or tokenizer.eos_token is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r}: it has no chat template, and the project's own format needs an end "
            f"token and the special tokens {', '.join(missing) or '(all there)'}; add them with "
            "tokenizer.add_special_tokens and resize the model's embeddings, or set the model's chat template"
        )


def _own_template(literals: set[str], eos: str) -> str:
    second = _read_template("own_format").replace("@EOS@", json.dumps(eos, ensure_ascii=False))
    return _first_part(literals) + second


def _wrapped_template(literals: set[str], original: str) -> str:
    return _first_part(literals) + _read_template("wrapped_format") + _BOUNDARY + original


def _first_part(literals: set[str]) -> str:
    heads = ", ".join(json.dumps(marker[1:].lower().replace(" ", "")) for marker in MARKERS.values())
    values = {
        "VERSION": str(META_PROMPT_VERSION),
        "DOT": DOT,
        "MARKER_HEADS": f"({heads})",
        "LITERALS": json.dumps(sorted(literals), ensure_ascii=False),  # the last, for it is not ours
    }
    text = _read_template("meta_prompt")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _read_template(name: str) -> str:
    return (files("metaalign_rl") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _joints(tokenizer: "PreTrainedTokenizerBase", template: str) -> list[str]:
    """What the template puts before, between and behind the texts, found by rendering a dialog of probe words."""
    chat = [
        {"role": role, "content": _PROBES[name]}
        for role, name in (
            ("system", "system"),
            ("user", "question"),
            ("assistant", "answer"),
            ("user", "again"),
            ("assistant", "final"),
        )
    ]
    try:
        full = _apply(tokenizer, chat, _PROBES["user"], template, generate=False)
        prompt = _apply(tokenizer, chat[:-1], _PROBES["user"], template, generate=True)
    except UserError as error:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r}: its chat template takes no system message with a dialog ({error})"
        ) from None
    lost = [name for name, word in _PROBES.items() if full.count(word) != 1]
    if lost:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r}: its chat template does not render these texts once each: "
            f"{', '.join(lost)}; set tokenizer.chat_template to one that does"
        )
    words = "|".join(_PROBES.values())
    return [*re.split(words, full), re.split(words, prompt)[-1]]


def _plain_literals(joints: Iterable[str]) -> set[str]:
    """Structure in the rendered text that is no special token: bracketed words, and role headers such as `USER:`."""
    found = set()
    for joint in joints:
        found |= set(_BRACKETED.findall(joint))
        found |= {line.strip() for line in _BRACKETED.sub("\n", joint).split("\n") if re.fullmatch(r"\W*\w[\w ]*:\s*", line)}
    return found


def _check_joints(literals: set[str], joints: Sequence[str]) -> None:
    """Refuse a template in which the end of one text, the joint and the start of the next could spell a literal."""
    for literal in sorted(literals):
        cuts = range(1, len(literal))
        for joint in joints[1:-2]:
            if joint in literal[1:-1]:
                raise UserError(f"chat template: two texts with {joint!r} between them could spell {literal!r}")
        for joint in joints:
            behind = any(joint.startswith(literal[cut:]) for cut in cuts)
            before = any(joint.endswith(literal[:cut]) for cut in cuts)
            if behind or before:
                raise UserError(f"chat template: a text beside {joint!r} could spell {literal!r}")
