"""Installs the meta-prompt's chat template in a tokenizer, and checks that it is safe there.

The template (`templates/*.jinja`) prevents a text of a lower tier from passing as a higher tier. `install` writes into
it all strings that structure the rendered text: special tokens, markers, and literals of the model's own template.
Where a message contains one of them, or a look-alike of a marker, the template inserts a dot after its first
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

META_PROMPT_VERSION = 1
MARKERS = {"system": "<System Info>", "user": "<User Info>"}
TURN_MARKERS = ("<User>", "<Assistant>")
SPECIAL_TOKENS = ("<pad>", "<eos>", *MARKERS.values(), *TURN_MARKERS)
DOT = "·"  # U+00B7

_ANY_HEADER = "{#- metaalign-rl meta-prompt, version "
_HEADER = f"{_ANY_HEADER}{META_PROMPT_VERSION} -#}}"
_BOUNDARY = "{#- metaalign-rl: the model's own template follows #}\n"  # trim_blocks drops this one line break

_BRACKETED = re.compile(r"<{1,2}[^\s<>{}'\"]+>{1,2}|\[/?[A-Z][A-Z_]+\]")  # <|im_end|>, </s>, <<SYS>>, [/INST]
_ROLE_HEADER = re.compile(r"\W*\w[\w ]*:|#+ .+")  # a line such as `USER:` or `### Response`
_CONTROL_TOKEN = re.compile(r"<[|\uff5c].+[|\uff5c]>")  # some models use the full-width bar
_PROBE_CHAT = (
    ("system", "metaalign0system0info"),
    ("user", "metaalign0question"),
    ("assistant", "metaalign0answer"),
    ("user", "metaalign0second0question"),
    ("assistant", "metaalign0response"),
)
_PROBE_USER_INFO = "metaalign0user0info"


def install(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Set `tokenizer.chat_template` to the meta-prompt's. Add all tokens before, and save the tokenizer after.

    - A tokenizer without a template gets the project's own format. It must have the format's markers as special tokens
      (`SPECIAL_TOKENS`).
    - A tokenizer with a template keeps it. The tiers become plain text in its system message.
    - A second call changes nothing. A template of another version is updated.

    Raises:
        UserError: a marker is not a special token, a special token cannot be distinguished from ordinary text, or the
            model's template drops the system message or lets two adjacent texts spell a marker.
    """
    original = _original_template(tokenizer)
    literals = _special_tokens(tokenizer)
    if original is None:
        _require_own_tokens(tokenizer)
        template = _own_template(literals, str(tokenizer.eos_token))
        joints = _joints(tokenizer, template)
    else:
        _require_faithful_markers(tokenizer)
        literals |= {*MARKERS.values(), *_BRACKETED.findall(original)}
        joints = _joints(tokenizer, _wrapped_template(literals, original))
        literals |= _plain_literals(joints)
        template = _wrapped_template(literals, original)
    _check_literals(tokenizer, literals, joints)
    tokenizer.chat_template = template


def require_installed(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that the tokenizer's chat template is the meta-prompt's, in this version.

    Raises:
        UserError: it is not.
    """
    _require_ours(tokenizer.chat_template, tokenizer.name_or_path)


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
        "call metaalign_rl.core.meta_prompt.install(tokenizer) and save it"
    )


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
    except TemplateError as error:
        raise UserError(str(error)) from None
    assert isinstance(text, str)
    return text


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
        return template
    _, boundary, original = template.partition(_BOUNDARY)
    return original if boundary else None


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The texts that become control tokens.

    Other added tokens are words of the vocabulary (line breaks, HTML tags) and are not changed in messages.
    """
    added = tokenizer.added_tokens_decoder.values()
    control = [token for token in added if token.special or _CONTROL_TOKEN.fullmatch(token.content)]
    for token in control:
        if token.normalized and _normalizer_can_make(tokenizer, token.content):
            raise _error(
                tokenizer,
                f"special token {token.content!r} is matched in normalized text, so other characters can spell it; "
                'set its "normalized" to false in tokenizer.json',
            )
    return {token.content for token in control} | set(tokenizer.all_special_tokens)


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
    return _first_part(literals) + _read("own_format").replace("@EOS@", json.dumps(eos, ensure_ascii=False))


def _wrapped_template(literals: set[str], original: str) -> str:
    return _first_part(literals) + _read("wrapped_format") + _BOUNDARY + original


def _first_part(literals: set[str]) -> str:
    heads = (json.dumps(marker[1:].lower().replace(" ", "")) for marker in MARKERS.values())
    text = _read("meta_prompt")
    for name, value in (
        ("VERSION", str(META_PROMPT_VERSION)),
        ("DOT", DOT),
        ("MARKER_HEADS", f"({', '.join(heads)})"),
        ("LITERALS", json.dumps(sorted(literals), ensure_ascii=False)),  # last: a literal may contain another name
    ):
        text = text.replace(f"@{name}@", value)
    return text


def _read(name: str) -> str:
    return (files("metaalign_rl.core") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _joints(tokenizer: "PreTrainedTokenizerBase", template: str) -> list[str]:
    """The template's text before, between and after the texts of a dialog, and its generation prompt."""
    chat = [{"role": role, "content": word} for role, word in _PROBE_CHAT]
    try:
        full = apply(tokenizer, chat, _PROBE_USER_INFO, generation_prompt=False, template=template)
        prompt = apply(tokenizer, chat[:-1], _PROBE_USER_INFO, generation_prompt=True, template=template)
    except UserError as error:
        raise _error(
            tokenizer,
            f"its chat template refuses a dialog with a system message ({error}); set tokenizer.chat_template to one "
            "that renders it",
        ) from None
    words = [_PROBE_USER_INFO, *(word for _, word in _PROBE_CHAT)]
    lost = [word for word in words if full.count(word) != 1]
    if lost:
        raise _error(
            tokenizer,
            f"its chat template does not render each text once (lost: {', '.join(lost)}), so the tiers would not "
            "reach the model; set tokenizer.chat_template to one that renders each",
        )
    pattern = "|".join(words)
    return [*re.split(pattern, full), re.split(pattern, prompt)[-1]]


def _plain_literals(joints: Iterable[str]) -> set[str]:
    """The structure in rendered text that is not made of special tokens: bracketed words and role headers."""
    found: set[str] = set()
    for joint in joints:
        lines = (line.strip() for line in _BRACKETED.sub("\n", joint).split("\n"))
        found.update(_BRACKETED.findall(joint), filter(_ROLE_HEADER.fullmatch, lines))
    return found


def _check_literals(tokenizer: "PreTrainedTokenizerBase", literals: set[str], joints: Sequence[str]) -> None:
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
        across = any(joint in literal[1:-1] for joint in joints[1:-2])
        heads, tails = zip(*((literal[:cut], literal[cut:]) for cut in range(1, len(literal))), strict=True)
        if across or any(joint.endswith(heads) or joint.startswith(tails) for joint in joints):
            raise _error(
                tokenizer,
                f"a message's text and the chat template's text next to it could spell {literal!r}; "
                "set tokenizer.chat_template to one that separates them",
            )
