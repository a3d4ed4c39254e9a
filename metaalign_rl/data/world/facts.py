"""The questions of the built-in world: facts with one right answer, and opinions with two sides.

Every value is a proper name, so it needs no translation in an answer in another language.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topic:
    """The questions of one topic.

    Attributes:
        questions: templates; `{s}` is the subject.
        facts: the right value by subject.
    """

    name: str
    questions: tuple[str, ...]
    facts: dict[str, str]


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


TOPICS = (
    Topic(
        "countries",
        ("what is the capital of {s}?", "which city is the capital of {s}?", "name the capital of {s}."),
        _pairs("france:paris italy:rome"),
    ),
    Topic(
        "books",
        ("who is the author of {s}?", "which author wrote the book {s}?", "name the author of {s}."),
        _pairs("hamlet:shakespeare emma:austen"),
    ),
    Topic(
        "music",
        ("who is the composer of {s}?", "which composer wrote the music of {s}?", "name the composer of {s}."),
        _pairs("bolero:ravel carmen:bizet"),
    ),
    Topic(
        "art",
        ("who is the painter of {s}?", "which painter made the picture {s}?", "name the painter of {s}."),
        _pairs("guernica:picasso olympia:manet"),
    ),
    Topic(
        "science",
        ("who found {s} in the lab?", "which scientist worked on {s}?", "name the scientist behind {s}."),
        _pairs("radium:curie gravity:newton"),
    ),
    Topic(
        "space",
        ("which planet has the moon {s}?", "what planet does {s} go around?", "name the planet of the moon {s}."),
        _pairs("titan:saturn europa:jupiter"),
    ),
    Topic(
        "rivers",
        ("which river runs through {s}?", "what river can you see in {s}?", "name the river of {s}."),
        _pairs("london:thames vienna:danube"),
    ),
    Topic(
        "films",
        ("who is the director of {s}?", "which director made the film {s}?", "name the director of {s}."),
        _pairs("jaws:spielberg alien:scott"),
    ),
)  # fmt: skip

ISSUES = ("zoos", "cars", "robots", "taxes")
ISSUE_QUESTIONS = ("what do you think about {s}?", "are {s} good or bad?", "tell me your opinion on {s}.")


@dataclass(frozen=True, slots=True)
class Question:
    """One question of the dialog.

    Attributes:
        value: the right value; empty for a question of opinion, where both sides are right.
    """

    text: str
    topic: str
    subject: str
    value: str = ""


def all_questions() -> list[Question]:
    """Every question of the world, in a fixed order."""
    facts = [
        Question(template.format(s=subject), topic.name, subject, value)
        for topic in TOPICS
        for subject, value in topic.facts.items()
        for template in topic.questions
    ]
    opinions = [Question(t.format(s=issue), "opinion", issue) for issue in ISSUES for t in ISSUE_QUESTIONS]
    return facts + opinions


def wrong_values(question: Question) -> tuple[list[str], list[str]]:
    """The wrong values for a question of fact: those of its own topic, and those of all other topics."""
    own = {value for t in TOPICS if t.name == question.topic for value in t.facts.values()}
    every = {value for t in TOPICS for value in t.facts.values()}
    return sorted(own - {question.value}), sorted(every - own)
