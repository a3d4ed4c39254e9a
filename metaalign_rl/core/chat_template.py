"""Installs the meta-prompt's chat template in a tokenizer, and checks that it is safe there.

The template (`templates/*.jinja`) prevents a text of a lower tier from passing as a higher tier. `install` writes into
it all strings that structure the rendered text: special tokens, markers, and literals of the model's own template.
Where a message contains one of them, or a look-alike of one in brackets, the template inserts a dot after its first
character. The template must do this itself, because servers render the saved template without our Python. Other values
that a client passes to a template (`tools`, other arguments) belong to the provider and are not changed.
"""

import json
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json
from metaalign_rl.core.lookalikes import invisible, lookalikes
from metaalign_rl.core.template_probe import (
    DIALOG_MARKER,
    TIER_MARKERS,
    TurnFormat,
    control_tokens,
    joints,
    read_format,
    special_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

META_PROMPT_VERSION = 3
MARKERS = TIER_MARKERS
MAX_MESSAGES = 4096  # of a dialog
TURN_MARKERS = ("<User>", "<Assistant>")
SPECIAL_TOKENS = ("<pad>", "<eos>", *MARKERS.values(), *TURN_MARKERS)
DOT = "·"  # U+00B7

_ANY_HEADER = "{#- metaalign-rl meta-prompt, version "
_HEADER = f"{_ANY_HEADER}{META_PROMPT_VERSION} -#}}"
_BEGIN = "{#- metaalign-rl: the model's own template follows #}\n"  # trim_blocks drops this one line break
_END = "{# metaalign-rl: the model's own template ends here #}"

_BRACKETED = re.compile(r"<{1,2}[^\s<>{}'\"]+>{1,2}|\[/?[A-Z][A-Z_]+\]")  # <|im_end|>, </s>, <<SYS>>, [/INST]
_ROLE_HEADER = re.compile(r"\W*\w[\w ]*:|#+ .+")  # a line such as `USER:` or `### Response`
_SHORTEST_LOOKALIKE = 8  # characters; shorter ones, such as `[s]`, are found in ordinary text
_MAX_PIECES = 1000  # of a text with look-alikes, split at brackets, that are looked at one by one
_FIXED_DATE = "2024-07-26"
_DATES = {"%d %b %Y": "26 Jul 2024", "%d %B %Y": "26 July 2024", "%B %d, %Y": "July 26, 2024", "%Y": "2024"}
_DATES |= {"%b %d %Y": "Jul 26 2024", "%A, %B %d, %Y": "Friday, July 26, 2024"}


def install(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Set `tokenizer.chat_template` to the meta-prompt's. Add all tokens before, and save the tokenizer after.

    - A tokenizer without a template gets the project's own format. It must have the format's markers as special tokens
      (`SPECIAL_TOKENS`).
    - A tokenizer with a template keeps it. The tiers become plain text in its system message. A template without system
      messages gets them in the first message of the user. Where nothing in the template separates the tiers from the
      dialog, `<Dialog>` does.
    - An answer follows the generation prompt in every case. Reasoning models get a closed reasoning block there, so
      that they answer directly. A date in the template is fixed, so that a row always has the same tokens.
    - A second call changes nothing. A template of another version is updated.

    Raises:
        UserError: a marker is not a special token, a special token cannot be distinguished from ordinary text, the
            model's template drops a message, ends no turn, or lets two adjacent texts spell a marker.
    """
    tokenizer.chat_template = meta_prompt_template(tokenizer)


def meta_prompt_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The template that `install` sets.

    Raises:
        UserError: see `install`.
    """
    original = _original_template(tokenizer)
    literals = _special_tokens(tokenizer)
    if original is None:
        _require_own_tokens(tokenizer)
        template = _own_template(literals, str(tokenizer.eos_token))
        _check_literals(tokenizer, literals, joints(tokenizer, template))
        return template
    _require_faithful_markers(tokenizer)
    literals |= {*MARKERS.values(), *_BRACKETED.findall(original)}
    constants = _constants(tokenizer, original)
    turns = read_format(tokenizer, constants + original, lambda text: _literals_in(text, literals))
    literals |= {DIALOG_MARKER} if turns.closing else set()
    found = joints(tokenizer, _wrapped_template(tokenizer, literals, set(), original, turns))
    plain = _plain_literals(found) - literals
    template = _wrapped_template(tokenizer, literals | plain, plain, original, turns)
    _check_literals(tokenizer, literals | plain, found)
    return template


def require_installed(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that the tokenizer's chat template is the meta-prompt's, in this version.

    Raises:
        UserError: it is not.
    """
    _require_ours(tokenizer.chat_template, tokenizer.name_or_path)


def require_unchanged(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that the tokenizer's chat template is the one that `install` sets. A changed one may not be safe.

    Raises:
        UserError: it is not.
    """
    require_installed(tokenizer)
    if tokenizer.chat_template != meta_prompt_template(tokenizer):
        raise _error(
            tokenizer,
            "its chat template or its special tokens were changed after the meta-prompt's template was installed; "
            "run `metaalign-rl prepare` on the original model again",
        )


def is_installed(checkpoint: Path) -> bool:
    """Whether a checkpoint's files have the meta-prompt's chat template, in this version."""
    try:
        require_saved(checkpoint)
    except UserError:
        return False
    return True


def require_saved(checkpoint: Path) -> None:
    """Like `require_installed`, from the checkpoint's files: importing transformers would take seconds.

    Raises:
        UserError: the chat template is not the meta-prompt's, or there is no tokenizer.
    """
    file, config = checkpoint / "chat_template.jinja", checkpoint / "tokenizer_config.json"
    template = file.read_text(encoding="utf-8") if file.is_file() else read_json(config).get("chat_template")
    _require_ours(template, str(checkpoint))


def _require_ours(template: object, name: str) -> None:
    if isinstance(template, str) and template.startswith(_HEADER):
        return
    ours = isinstance(template, str) and template.startswith(_ANY_HEADER)
    raise UserError(
        f"tokenizer {name!r}: expected the meta-prompt's chat template, version {META_PROMPT_VERSION}, found "
        f"{'another version' if ours else 'another template' if template else 'no template'}; "
        "run `metaalign-rl prepare`, or call metaalign_rl.core.meta_prompt.install(tokenizer) and save it"
    )


def _error(tokenizer: "PreTrainedTokenizerBase", message: str) -> UserError:
    return UserError(f"tokenizer {tokenizer.name_or_path!r}: {message}")


def _original_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The model's own template, without the part that an earlier `install` put before it."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        raise _error(
            tokenizer,
            f"expected one chat template, found several ({', '.join(template)}); set tokenizer.chat_template to one",
        )
    if template is None:
        return None
    assert isinstance(template, str)
    if not template.startswith(_ANY_HEADER):
        return template.removesuffix("\n")  # Jinja drops it only at the end of a template
    _, begin, rest = template.partition(_BEGIN)
    original, end, _ = rest.rpartition(_END)
    return (original if end else rest) if begin else None


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The texts that become control tokens.

    Raises:
        UserError: other characters can spell one of them.
    """
    for token in control_tokens(tokenizer):
        if token.normalized and _normalizer_can_make(tokenizer, token.content):
            raise _error(
                tokenizer,
                f"special token {token.content!r} is matched in normalized text, so other characters can spell it; "
                'set its "normalized" to false in tokenizer.json',
            )
    return special_tokens(tokenizer)


def _normalizer_can_make(tokenizer: "PreTrainedTokenizerBase", token: str) -> bool:
    """Whether normalizing removes a character, or turns another character into one of the token's."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None:
        return False
    frame = normalizer.normalize_str("xx")  # a normalizer may prepend a character to every text
    for code in (*range(0xD800), *range(0xE000, 0x10000)):
        unchanged = frame.replace("xx", f"x{chr(code)}x")
        found = normalizer.normalize_str(f"x{chr(code)}x")
        if found != unchanged and (found == frame or (set(found) - {"x"}) & set(token)):
            return True
    return False


def _require_own_tokens(tokenizer: "PreTrainedTokenizerBase") -> None:
    specials = _special_tokens(tokenizer)
    missing = [token for token in (*MARKERS.values(), *TURN_MARKERS) if token not in specials]
    if tokenizer.eos_token is None:
        missing.append("an end token (eos_token)")
    if missing:
        raise _error(
            tokenizer,
            f"it has no chat template, and lacks {', '.join(missing)} for the project's own format; add them with "
            "tokenizer.add_special_tokens and resize the model's embeddings, or set tokenizer.chat_template to the "
            "model's own",
        )


def _require_faithful_markers(tokenizer: "PreTrainedTokenizerBase") -> None:
    """In a model's own template the markers are plain text, so normalizing must not create one."""
    for marker in MARKERS.values():
        if _normalizer_can_make(tokenizer, marker):
            raise _error(
                tokenizer,
                f"it normalizes text, so other characters can spell {marker!r}; use a tokenizer that does not change "
                "letters, or remove its chat template and add the markers as special tokens",
            )


def _own_template(literals: set[str], eos: str) -> str:
    return _first_part(literals, set(), "") + _fill("own_format", {"EOS": json.dumps(eos, ensure_ascii=False)})


def _wrapped_template(
    tokenizer: "PreTrainedTokenizerBase", literals: set[str], headers: set[str], original: str, turns: TurnFormat
) -> str:
    strings = {"CLOSING": turns.closing, "OPENING": turns.opening, "LEAD": turns.lead, "AFTER": turns.after}
    values = {name: json.dumps(text, ensure_ascii=False) for name, text in strings.items()}
    values["IN_FIRST_MESSAGE"] = "true" if turns.in_first_message else "false"
    values["CONSTANTS"] = _constants(tokenizer, original)
    reasoning_end = "</think>" if "</think>" in original + turns.opening else ""
    head = _first_part(literals, headers, reasoning_end) + _fill("wrapped_format", values)
    return head + _BEGIN + original + _END + _fill("answer", values)


def _constants(tokenizer: "PreTrainedTokenizerBase", original: str) -> str:
    """What the model's template must not take from its caller: the date, and tokens that a client could replace."""
    lines = [
        f"{{%- set {name} = {json.dumps(token or '', ensure_ascii=False)} -%}}"
        for name, token in (("bos_token", tokenizer.bos_token), ("eos_token", tokenizer.eos_token))
    ]
    if "strftime_now" in original:
        dates = json.dumps(_DATES)
        lines.append(
            f"{{%- macro strftime_now(format) -%}}{{{{- {dates}.get(format, '{_FIXED_DATE}') -}}}}{{%- endmacro -%}}"
        )
    return "".join(lines)


def _first_part(literals: set[str], headers: set[str], reasoning_end: str) -> str:
    others, plain = lookalikes()
    brackets = ["<", "[", "{", *(other for other, ascii_ in zip(others, plain, strict=True) if ascii_ in "<[{")]
    return _fill(
        "meta_prompt",
        {
            "VERSION": str(META_PROMPT_VERSION),
            "DOT": DOT,
            "MESSAGES": str(MAX_MESSAGES),
            "PIECES": str(_MAX_PIECES),
            "REASONING_END": json.dumps(reasoning_end),
            "BRACKETED": f"({''.join(f'{json.dumps(text)}, ' for text in _loose_literals(literals))})",
            "BRACKETS": json.dumps(brackets, ensure_ascii=False),
            "INVISIBLE": json.dumps(invisible()),
            "LOOKALIKES": json.dumps(others, ensure_ascii=False),
            "LOOKED_LIKE": json.dumps(plain),
            "HEADERS": json.dumps(sorted(headers), ensure_ascii=False),
            "LITERALS": json.dumps(sorted(literals), ensure_ascii=False),  # last: a literal may contain another name
        },
    )


def _loose_literals(literals: set[str]) -> list[str]:
    """The literals in brackets as the macro `metaalign_loose` prints them, without those too short to be told apart."""
    others, plain = lookalikes()
    table = str.maketrans(others, plain) | str.maketrans("[{]}", "<<>>", "_-/")
    loose = {"".join(text.translate(table).lower().split()) for text in {*literals, *MARKERS.values()}}
    return sorted(text for text in loose if len(text) >= _SHORTEST_LOOKALIKE and text.rfind("<") == 0)


def _fill(name: str, values: dict[str, str]) -> str:
    """A part of the template with its `@NAMES@` replaced."""
    text = (files("metaalign_rl.core") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def _literals_in(text: str, literals: set[str]) -> set[str]:
    """The strings in a template's own text that a message cannot contain."""
    return {literal for literal in literals if literal in text} | _plain_literals([text])


def _plain_literals(texts: Iterable[str]) -> set[str]:
    """The structure in rendered text that is not made of special tokens: bracketed words and role headers."""
    found: set[str] = set()
    for joint in texts:
        lines = (line.strip() for line in _BRACKETED.sub("\n", joint).split("\n"))
        found.update(_BRACKETED.findall(joint), filter(_ROLE_HEADER.fullmatch, lines))
    return found


def _check_literals(tokenizer: "PreTrainedTokenizerBase", literals: set[str], between: Sequence[str]) -> None:
    """Refuse literals that the dot cannot split, and those that two texts and the joint between them could spell.

    Raises:
        UserError: names the literal.
    """
    for literal in sorted(literals):
        if len(literal) < 2 or DOT in literal:
            raise _error(
                tokenizer,
                f"{literal!r}, a special token or a literal of its chat template, cannot be distinguished from "
                f"ordinary text; use at least two characters, without {DOT!r}",
            )
        across = any(joint in literal[1:-1] for joint in between[1:-2])
        heads, tails = zip(*((literal[:cut], literal[cut:]) for cut in range(1, len(literal))), strict=True)
        if across or any(joint.endswith(heads) or joint.startswith(tails) for joint in between):
            raise _error(
                tokenizer,
                f"a message's text and the chat template's text next to it could spell {literal!r}; "
                "set tokenizer.chat_template to one that separates them",
            )
