"""Writes the world's answers: a question answered in a style. `metaalign_rl.data.checks.world` reads them."""

from metaalign_rl.data.checks.world import (
    CERTAINTIES,
    FORMATS,
    LANGUAGES,
    OPENINGS,
    PLAIN_FRAME,
    SHORT_FRAME,
    TAIL,
)
from metaalign_rl.data.world.facts import Question

Style = dict[str, str]
"""How an answer is written: a value by kind of preference, such as `{"case": "upper"}`."""


def say(question: Question, style: Style, value: str | None = None) -> str:
    """The answer to `question` in `style`.

    Args:
        style: for a question of opinion it must hold the side, `opinion: for` or `opinion: against`. `refusal: refuse`
            overrides all other entries.
        value: replaces the right value (in a refusal, the topic), to make an answer that is wrong on purpose.
    """
    if style.get("refusal") == "refuse":
        return f"sorry, i can not talk about {value or question.topic}."
    words = _core(question, style, value or question.value)
    opening = OPENINGS.get(style.get("tone", ""))
    text = (f"{opening}, " if opening else "") + words + "."
    if "ending" in style:
        text += f" {style['ending']}."
    text = FORMATS.get(style.get("format", ""), "") + text
    return text.upper() if style.get("case") == "upper" else text


def _core(question: Question, style: Style, value: str) -> str:
    if style.get("length") == "short":
        return f"{style['opinion']} {question.subject}" if not question.value else f"{SHORT_FRAME} {value}"
    if question.value:
        frame = LANGUAGES.get(style.get("language", ""), PLAIN_FRAME)
    else:
        frame, value = "i am", f"{style['opinion']} {question.subject}"
    parts = (CERTAINTIES.get(style.get("certainty", "")), frame, value)
    core = " ".join(part for part in parts if part)
    return f"{core} {TAIL}" if style.get("length") == "long" else core
