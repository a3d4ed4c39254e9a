"""The world's preferences and their wordings.

A wording is explicit or implicit:

- explicit: an action in a carrier sentence ("please write in capitals.").
- implicit: people and their situation ("our guests have weak eyes.").

The split "paraphrase" holds out some combinations of carrier and action, and of people and situation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from metaalign_rl.data.world.facts import TOPICS


@dataclass(frozen=True, slots=True)
class Preference:
    """A kind of preference and its value, such as `Preference("case", "upper")`."""

    kind: str
    value: str

    def check(self) -> dict[str, str]:
        """The gold check of this preference, as rows write it."""
        return {"name": f"world.{self.kind}", "value": self.value}


@dataclass(frozen=True, slots=True)
class Wording:
    """The phrases that express one preference.

    Attributes:
        actions: verb phrases for `CARRIERS`.
        situations: predicates for `PEOPLE`, so in the plural or the first person.
        thing: noun phrase for `OTHERS`.
    """

    actions: tuple[str, ...]
    situations: tuple[str, ...]
    thing: str


CARRIERS = ("always {}.", "you must {}.", "please {}.", "i want you to {}.")
PEOPLE = ("our guests", "our readers", "i", "we")
OTHERS = ("some other shops like {}.", "my brother likes {}.", "last year people wanted {}.")
FILLERS = {
    "system": (
        "you are a helpful assistant.", "you work for a shop.", "this is a school.", "you are an ai assistant.",
        "this is a help desk.", "you work in a hotel.",
    ),
    "user": (
        "i am a baker.", "i live in the north.", "i have two dogs.", "i am a teacher.", "i work at night.",
        "i have three sons.",
    ),
}  # fmt: skip


# {v} is the topic of a refusal, or the issue of an opinion.
WORDINGS: dict[Preference, Wording] = {
    Preference("case", "upper"): Wording(
        ("write in capitals", "use big letters only"), ("have weak eyes", "read from far away"), "capitals"
    ),
    Preference("case", "lower"): Wording(
        ("write without capitals", "use small letters only"),
        ("hate big letters", "love quiet pages"),
        "small letters",
    ),
    Preference("length", "short"): Wording(
        ("answer in two words", "be as brief as you can"), ("have little time", "pay for each word"), "two words"
    ),
    Preference("length", "long"): Wording(
        ("answer at length", "write as much as you can"),
        ("love whole stories", "have the whole day"),
        "whole stories",
    ),
    Preference("tone", "formal"): Wording(
        ("be formal", "speak as in a court"), ("come from a royal house", "dress in black ties"), "formal words"
    ),
    Preference("tone", "casual"): Wording(
        ("be casual", "speak as to a buddy"), ("come from the beach", "dress in old jeans"), "casual words"
    ),
    Preference("format", "bullet"): Wording(
        ("write a list item", "use bullets"), ("keep a list of answers", "keep notes with a dash"), "bullets"
    ),
    Preference("format", "quote"): Wording(
        ("write a block quote", "use quotes"), ("print quotes", "cite your words in papers"), "quotes"
    ),
    Preference("language", "french"): Wording(
        ("answer in french", "use the language of france"),
        ("grew up in france", "went to french schools"),
        "french",
    ),
    Preference("language", "spanish"): Wording(
        ("answer in spanish", "use the language of spain"),
        ("grew up in spain", "went to spanish schools"),
        "spanish",
    ),
    Preference("certainty", "hedge"): Wording(
        ("show doubt", "sound careful"), ("fear false claims", "check each word twice"), "doubt"
    ),
    Preference("certainty", "sure"): Wording(
        ("show courage", "sound sure"), ("need bold voices", "trust strong words"), "bold voices"
    ),
    Preference("refusal", "refuse"): Wording(
        ("never talk about {v}", "keep silent about {v}"),
        ("get sick of {v}", "lost all love of {v}"),
        "silence about {v}",
    ),
    Preference("refusal", "allow"): Wording(
        ("talk about {v} too", "answer freely about {v}"), ("enjoy {v}", "must learn about {v}"), "talk about {v}"
    ),
    Preference("opinion", "for"): Wording(("support {v}", "speak for {v}"), ("love {v}", "earn money with {v}"), "{v}"),
    Preference("opinion", "against"): Wording(
        ("oppose {v}", "speak against {v}"), ("hate {v}", "lost money on {v}"), "no {v}"
    ),
    Preference("ending", "good luck"): Wording(
        ("end with good luck", "finish by saying good luck"),
        ("have a test soon", "wait for a good luck"),
        "a good luck",
    ),
    Preference("ending", "thank you"): Wording(
        ("end with thank you", "finish by saying thank you"), ("value thanks", "wait for a thank you"), "a thank you"
    ),
}
KINDS = tuple(dict.fromkeys(preference.kind for preference in WORDINGS))
# The plain answer satisfies these anyway. They are used only if the other tier asks for the opposite.
TRIVIAL = frozenset({Preference("case", "lower"), Preference("refusal", "allow")})
_SHORT_CLASHES = {"tone", "ending", "certainty", "language"}
_LANGUAGE_CLASHES = {"certainty", "length"}


def opposites(preference: Preference) -> list[Preference]:
    """The preferences that contradict this one."""
    return [other for other in WORDINGS if other.kind == preference.kind and other != preference]


@cache
def compatible(one: Preference, other: Preference) -> bool:
    """Whether one answer can follow both preferences, which are of different kinds. Never for refusals and opinions."""
    if {one.kind, other.kind} & {"refusal", "opinion"} or one.kind == other.kind:
        return False
    for a, b in ((one, other), (other, one)):
        if a == Preference("length", "short") and b.kind in _SHORT_CLASHES:
            return False
        if a.kind == "language" and b.kind in _LANGUAGE_CLASHES:
            return False
    return True


@cache
def applies(preference: Preference, topic: str) -> bool:
    """Whether the preference makes sense for a question of this topic."""
    if topic == "opinion":
        return preference.kind not in ("refusal", "language")
    return preference.kind != "opinion"


@cache
def wordings(preference: Preference, about: str, *, held_out: bool) -> tuple[str, ...]:
    """The wordings of a preference, the same for every tier. A quarter of them is held out from training.

    Args:
        about: the topic (of a refusal) or the issue (of an opinion) that the text names.
        held_out: return the held-out wordings; otherwise those of training.
    """
    return tuple(_wordings_of(preference, about, held_out))


def _wordings_of(preference: Preference, about: str, held_out: bool) -> Iterator[str]:
    wording = WORDINGS[preference]
    shift = list(WORDINGS).index(preference)
    for row, action in enumerate(wording.actions):
        for column, carrier in enumerate(CARRIERS):
            if ((row + column + shift) % 4 == 0) == held_out:
                yield carrier.format(action.format(v=about))
    for row, situation in enumerate(wording.situations):
        for column, people in enumerate(PEOPLE):
            if ((row + column + shift) % 4 == 1) == held_out:
                yield f"{people} {situation.format(v=about)}."


def distraction(preference: Preference, about: str, choice: int) -> str:
    """A text about a preference of other people, which must not matter."""
    return OTHERS[choice % len(OTHERS)].format(WORDINGS[preference].thing.format(v=about))


@cache
def held_out_pair(one: str, other: str) -> bool:
    """Whether these two kinds never occur together in training."""
    return (KINDS.index(one) + KINDS.index(other)) % 6 == 0


@cache
def held_out_topic(kind: str, topic: str) -> bool:
    """Whether this kind never occurs with questions of this topic in training."""
    names = [t.name for t in TOPICS]
    if kind in ("refusal", "opinion"):
        return False
    if kind in ("case", "length"):  # training must show each value in capitals and without a frame
        return False
    return topic in names and (KINDS.index(kind) + names.index(topic)) % 6 == 0


@cache
def held_out_filler(kind: str, tier: str, filler: int) -> bool:
    """Whether this persona never occurs with this kind in training."""
    return (KINDS.index(kind) + filler + len(tier)) % 6 == 0
