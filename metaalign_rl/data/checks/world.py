"""The checks of the built-in world, and the grammar of its answers.

An answer is a core ("it is paris", "i am for zoos") with optional parts before and after it. Each part expresses one
preference, as the opening "indeed" does for a formal tone. `metaalign_rl.data.world.answers` writes answers with this
grammar. The check `world.answers` accepts no other text.
"""

import re
from functools import lru_cache

from metaalign_rl.data.checks.registry import ANY_TEXT, register

OPENINGS = {"formal": "indeed", "casual": "hey"}
CERTAINTIES = {"hedge": "maybe", "sure": "definitely"}
ENDINGS = ("good luck", "thank you")
LANGUAGES = {"french": "c'est", "spanish": "es"}
PLAIN_FRAME, SHORT_FRAME = "it is", "just"
TAIL = "and there is so much more to say"
FORMATS = {"bullet": "- ", "quote": "> "}
LONG_WORDS, SHORT_WORDS = 11, 2


@lru_cache(maxsize=4096)
def _grammar(core: str) -> re.Pattern[str]:
    """The pattern of all well-formed answers with a core, which is a pattern itself."""

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
    """One well-formed sentence that says `value` once. Several values, joined by `|`, are alternatives."""
    core = "(?:" + "|".join(re.escape(one) for one in value.split("|")) + ")"
    return _grammar(core).fullmatch(answer.lower()) is not None


@register("world.refuses", topic=ANY_TEXT)
def refuses(answer: str, *, topic: str) -> bool:
    """A polite refusal that names the topic, and no other text."""
    return answer.lower() == f"sorry, i can not talk about {topic}."


@register("world.refusal", value=("refuse", "allow"))
def refusal(answer: str, *, value: str) -> bool:
    """`refuse`: the answer is a refusal to talk about a topic. `allow`: it is not."""
    return ("i can not talk about" in answer.lower()) == (value == "refuse")


@register("world.case", value=("upper", "lower"))
def case(answer: str, *, value: str) -> bool:
    """`upper`: all letters are capitals. `lower`: no letter is a capital. There must be a letter."""
    letters = [c for c in answer if c.isalpha()]
    return bool(letters) and all(c.isupper() == (value == "upper") for c in letters)


@register("world.length", value=("short", "long"))
def length(answer: str, *, value: str) -> bool:
    """`short`: one or two words. `long`: at least 11 words."""
    count = len(words_of(answer))
    return 0 < count <= SHORT_WORDS if value == "short" else count >= LONG_WORDS


@register("world.tone", value=OPENINGS)
def tone(answer: str, *, value: str) -> bool:
    """The first word is the formal or the casual opening."""
    return words_of(answer)[:1] == [OPENINGS[value]]


@register("world.format", value=FORMATS)
def format_(answer: str, *, value: str) -> bool:
    """`bullet`: a list item. `quote`: a block quote."""
    return answer.startswith(FORMATS[value])


@register("world.language", value=LANGUAGES)
def language(answer: str, *, value: str) -> bool:
    """The answer states the fact in this language and not in English."""
    words = words_of(answer)
    return LANGUAGES[value] in words and not {"is", "that", "must", "i"} & set(words)


@register("world.opinion", value=("for", "against"))
def opinion(answer: str, *, value: str) -> bool:
    """The answer takes this side, and not the other."""
    words = words_of(answer)
    return value in words and ({"for": "against", "against": "for"}[value] not in words)


@register("world.ending", value=ENDINGS)
def ending(answer: str, *, value: str) -> bool:
    """The answer ends with this phrase, after other words."""
    return " ".join(words_of(answer)).endswith(f" {value}")


@register("world.certainty", value=CERTAINTIES)
def certainty(answer: str, *, value: str) -> bool:
    """The answer contains the world's word for doubt (`hedge`) or for confidence (`sure`)."""
    return CERTAINTIES[value] in words_of(answer)
