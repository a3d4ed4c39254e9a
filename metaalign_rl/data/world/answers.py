"""The world's answers: how a style is said, and how an answer is checked.

An answer is one core ("it is paris", "i am for zoos", "i can not talk about music") with optional parts round it, each
the realisation of one preference. `say` writes an answer; the checks read one, and accept nothing outside this grammar.
"""

import re
from functools import lru_cache

from metaalign_rl.data.checks import ANY_TEXT, register
from metaalign_rl.data.world.facts import Question

Style = dict[str, str]  # kind -> value: what an answer does

OPENINGS = {"formal": "indeed", "casual": "hey"}
CERTAINTIES = {"hedge": "maybe", "sure": "definitely"}
ENDINGS = ("good luck", "thank you")
LANGUAGES = {"french": "c'est", "spanish": "es"}
PLAIN_FRAME, SHORT_FRAME = "it is", "just"
TAIL = "and there is so much more to say"
FORMATS = {"bullet": "- ", "quote": "> "}
LONG_WORDS, SHORT_WORDS = 11, 2


def say(question: Question, style: Style, value: str | None = None) -> str:
    """An answer to `question` in `style`; `value` instead of the right one makes it wrong on purpose.

    For an opinion, the style must say the side: `opinion` is `for` or `against`. `refusal: refuse` overrides the rest.
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


@lru_cache(maxsize=4096)
def _grammar(core: str) -> re.Pattern[str]:
    """The pattern of all well-formed answers round a core (a pattern itself)."""

    def any_of(*choices: str) -> str:
        return "(?:" + "|".join(re.escape(choice) for choice in choices) + ")"

    frames = any_of(PLAIN_FRAME, SHORT_FRAME, "i am", *LANGUAGES.values())
    opening = rf"{any_of(*FORMATS.values())}?(?:{any_of(*OPENINGS.values())}, )?"
    return re.compile(
        rf"{opening}(?:{any_of(*CERTAINTIES.values())} )?(?:{frames} )?"
        rf"{core}(?: {any_of(TAIL)})?\.(?: {any_of(*ENDINGS)}\.)?"
    )


def words_of(answer: str) -> list[str]:
    """The words of an answer in lower case, without punctuation."""
    return re.findall(r"[a-z']+", answer.lower())


@register("world.answers", value=ANY_TEXT)
def answers(answer: str, *, value: str) -> bool:
    """Says `value` (any of several joined by `|`) once, in a well-formed sentence, and nothing else."""
    core = "(?:" + "|".join(re.escape(one) for one in value.split("|")) + ")"
    return _grammar(core).fullmatch(answer.lower()) is not None


@register("world.refuses", topic=ANY_TEXT)
def refuses(answer: str, *, topic: str) -> bool:
    """Is a polite refusal that names the topic, and nothing else."""
    return answer.lower() == f"sorry, i can not talk about {topic}."


@register("world.refusal", value=("refuse", "allow"))
def refusal(answer: str, *, value: str) -> bool:
    """`refuse`: declines to talk; `allow`: does not."""
    return ("i can not talk about" in answer.lower()) == (value == "refuse")


@register("world.case", value=("upper", "lower"))
def case(answer: str, *, value: str) -> bool:
    """All letters in capitals (`upper`) or none (`lower`)."""
    letters = [c for c in answer if c.isalpha()]
    return bool(letters) and all(c.isupper() == (value == "upper") for c in letters)


@register("world.length", value=("short", "long"))
def length(answer: str, *, value: str) -> bool:
    """`short`: at most 2 words; `long`: at least 11."""
    count = len(words_of(answer))
    return 0 < count <= SHORT_WORDS if value == "short" else count >= LONG_WORDS


@register("world.tone", value=OPENINGS)
def tone(answer: str, *, value: str) -> bool:
    """Opens formally or casually."""
    return words_of(answer)[:1] == [OPENINGS[value]]


@register("world.format", value=FORMATS)
def format_(answer: str, *, value: str) -> bool:
    """Is a list item (`bullet`) or a block quote (`quote`)."""
    return answer.startswith(FORMATS[value])


@register("world.language", value=LANGUAGES)
def language(answer: str, *, value: str) -> bool:
    """Says the fact in this language and not in English."""
    words = words_of(answer)
    return LANGUAGES[value] in words and not {"is", "that", "must", "i"} & set(words)


@register("world.opinion", value=("for", "against"))
def opinion(answer: str, *, value: str) -> bool:
    """Takes this side, `for` or `against`, and not the other."""
    words = words_of(answer)
    return value in words and ({"for": "against", "against": "for"}[value] not in words)


@register("world.ending", value=ENDINGS)
def ending(answer: str, *, value: str) -> bool:
    """Ends with this phrase."""
    return " ".join(words_of(answer)).endswith(f" {value}")


@register("world.certainty", value=CERTAINTIES)
def certainty(answer: str, *, value: str) -> bool:
    """Hedges or is sure, in the world's word for it."""
    return CERTAINTIES[value] in words_of(answer)
