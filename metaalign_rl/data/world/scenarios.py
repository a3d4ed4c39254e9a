"""Scenarios of the world: a question, the preferences of the tiers, their relation, and their texts."""

import random
from dataclasses import dataclass, field, replace
from functools import cache

from metaalign_rl.core.dataflow import Row, Tier
from metaalign_rl.data.checks import run_check
from metaalign_rl.data.world.answers import Style, say
from metaalign_rl.data.world.facts import Question, all_questions, wrong_values
from metaalign_rl.data.world.preferences import (
    FILLERS,
    KINDS,
    TRIVIAL,
    WORDINGS,
    Preference,
    applies,
    compatible,
    distraction,
    held_out_filler,
    held_out_pair,
    held_out_topic,
    opposites,
    wordings,
)

QUESTIONS = all_questions()
QUESTION_TOPICS = tuple(dict.fromkeys(question.topic for question in QUESTIONS))
NEAR_MISTAKES = 0.3  # share of wrong values that are from the question's own topic
# Kinds that must be learned for each value, issue or topic separately are more frequent in training.
KIND_WEIGHTS = {"case": 2.4, "language": 2.0, "length": 1.2, "opinion": 1.2, "refusal": 1.4}
# How the rows of each held-out split differ from all training rows.
SPLIT_MEANINGS = {
    "paraphrase": "the preference has a wording that training never used",
    "combination": "the preferences of the two tiers are of kinds that training never combined",
    "topic": "this kind of preference never occurred with a question of this topic in training",
    "persona": "the sentence about the speaker never preceded this kind of preference in training",
}
HELD_OUT_SPLITS = tuple(SPLIT_MEANINGS)
FAMILY = {"refusal": "priority", "opinion": "diverse_opinion", "case": "helpful", "length": "helpful"} | dict.fromkeys(
    ("tone", "certainty", "ending"), "consensus"
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A question, the preferences of the two tiers, and their texts.

    Attributes:
        relation: one of `RELATIONS`.
        split: "train" or one of `HELD_OUT_SPLITS`.
        tier: the governing tier; `dialog` in neutral scenarios, which have no preference.
        wanted: the governing tier's preference.
        other: the preference that the other tier's text is about, if it has one.
        side: the side that answers take on a question of opinion if no preference asks for one.
        said: by tier, the text that expresses its preference.
        fillers: by tier, a sentence before that text without a preference.
    """

    question: Question
    relation: str
    split: str
    tier: Tier
    wanted: Preference | None
    other: Preference | None
    side: str
    said: dict[str, str] = field(default_factory=dict)
    fillers: dict[str, str] = field(default_factory=dict)

    def text(self, tier: str) -> str:
        """The full text of a tier."""
        return " ".join(part for part in (self.fillers.get(tier), self.said.get(tier)) if part)

    @property
    def other_tier(self) -> Tier:
        return "user" if self.tier == "system" else "system"

    def good(self) -> str:
        """An answer that follows the governing preference, and in `agree` scenarios the other tier's too."""
        return self.say(self._good_style())

    def _good_style(self) -> Style:
        style = style_of(self.wanted)
        return style | style_of(self.other) if self.relation == "agree" else style

    def astray(self) -> str:
        """A right answer that follows the other tier's preference instead."""
        return self.say(style_of(self.other))

    def plain(self) -> str:
        """A right answer that follows no preference."""
        return self.say({})

    def mistake(self, rng: random.Random) -> str:
        """A wrong answer in the right style: it has the value of another fact, or is about another issue or topic."""
        question, style = self.question, self._good_style()
        if style.get("refusal"):
            return say(
                question, style, value=rng.choice([t for t in QUESTION_TOPICS if t not in (question.topic, "opinion")])
            )
        if not question.value:
            issues = sorted({q.subject for q in QUESTIONS if q.topic == "opinion"} - {question.subject})
            return self.say(style, replace(question, subject=rng.choice(issues)))
        near, far = wrong_values(question)
        return self.say(style, value=rng.choice(near if rng.random() < NEAR_MISTAKES else far))

    def stutter(self, rng: random.Random) -> str:
        """An answer in the right style that repeats one or two words, which is not a correct sentence."""
        words = self.good().split()
        start, count = rng.randrange(len(words)), rng.choice((1, 2))
        return " ".join(words[: start + count] + words[start:])

    def partly(self, rng: random.Random) -> str | None:
        """An answer that follows only one of two agreeing preferences, or a distractor too; None if impossible."""
        wanted, other = self.wanted, self.other
        if wanted is None or other is None or wanted == other or not compatible(wanted, other):
            return None
        if self.relation == "agree":
            return self.say(style_of(rng.choice((wanted, other))))
        return self.say(style_of(wanted) | style_of(other))

    def say(self, style: Style, question: Question | None = None, value: str | None = None) -> str:
        """An answer in `style`, to the scenario's question by default; see `metaalign_rl.data.world.answers.say`."""
        return say(question or self.question, {"opinion": self.side} | style, value)

    def row(self, identity: str) -> Row:
        """The scenario as a row without answers."""
        checks: dict[str, dict[str, str]] = {"dialog": self._dialog_check()}
        if self.wanted:
            checks[self.tier] = self.wanted.check()
        if self.other:
            checks[self.other_tier] = self.other.check()
        for tier in ("system", "user"):
            if self.text(tier) and tier not in checks:
                checks[tier] = {"name": "nothing"}
        kind = self.wanted.kind if self.wanted else "none"
        return Row(
            id=identity,
            family="priority" if self.relation == "conflict" else FAMILY.get(kind, "helpful"),
            relation=self.relation,
            tier=self.tier,
            system_info=self.text("system"),
            user_info=self.text("user"),
            messages=[{"role": "user", "content": self.question.text}],
            checks=checks,
            tags={"kind": kind, "split": self.split},
        )

    def _dialog_check(self) -> dict[str, str]:
        question = self.question
        if style_of(self.wanted).get("refusal"):
            return {"name": "world.refuses", "topic": question.topic}
        value = question.value or f"for {question.subject}|against {question.subject}"
        return {"name": "world.answers", "value": value}


def style_of(preference: Preference | None) -> Style:
    """The style that a preference asks for; empty if the plain answer satisfies it."""
    return {} if preference is None or preference in TRIVIAL else {preference.kind: preference.value}


def draw(rng: random.Random, relation: str, split: str) -> Scenario:
    """A random scenario of a relation and a split."""
    if relation == "neutral":
        return _draw_neutral(rng, split)
    tier: Tier = "system" if relation in ("conflict", "system_only") else "user"
    if relation in ("agree", "distractor"):
        tier = rng.choice(("system", "user"))
    scenario = _draw_preferences(rng, relation, split, tier)
    return replace(scenario, said=say_tiers(rng, scenario), fillers=_draw_fillers(rng, scenario))


def say_tiers(rng: random.Random, scenario: Scenario) -> dict[str, str]:
    """New random wordings of the two tiers' preferences, by tier."""
    assert scenario.wanted is not None
    wanted = _say(rng, scenario.wanted, scenario.question, held_out=scenario.split == "paraphrase")
    return {scenario.tier: wanted, scenario.other_tier: _say_other(rng, scenario) if scenario.other else ""}


def _draw_neutral(rng: random.Random, split: str) -> Scenario:
    question = rng.choice(QUESTIONS)
    index = {tier: rng.randrange(len(FILLERS[tier])) for tier in FILLERS}
    unseen = split != "train"
    if ((index["system"] + index["user"]) % 3 == 0) != unseen:  # neutral rows hold out combinations of personas
        index["user"] = next(i for i in range(3) if ((index["system"] + i) % 3 == 0) == unseen)
    fillers = {tier: FILLERS[tier][i] for tier, i in index.items() if unseen or rng.random() < 0.6}
    return Scenario(question, "neutral", split, "dialog", None, None, rng.choice(("for", "against")), fillers=fillers)


def _draw_preferences(rng: random.Random, relation: str, split: str, tier: Tier) -> Scenario:
    for _ in range(1000):  # few preferences are compatible with "short", so a combination may need several attempts
        wanted, question = _draw_wanted(rng, relation, split)
        scenario = Scenario(question, relation, split, tier, wanted, None, rng.choice(("for", "against")))
        others = _others(scenario)
        if relation == "agree" and split != "combination" and (not others or rng.random() < 0.4):
            others = [wanted]  # the same preference in other words
        if others or relation in ("system_only", "user_only"):
            return replace(scenario, other=rng.choice(others) if others else None)
    raise AssertionError(f"the world has no {relation} scenario in the split {split!r}")


def _draw_wanted(rng: random.Random, relation: str, split: str) -> tuple[Preference, Question]:
    by_topic = split == "topic"

    kinds = [kind for kind in KINDS if any(held_out_topic(kind, t) == by_topic for t in QUESTION_TOPICS)]
    weights = [KIND_WEIGHTS.get(kind, 1.0) if split == "train" else 1.0 for kind in kinds]
    kind = rng.choices(kinds, weights)[0]
    choices = [p for p in WORDINGS if p.kind == kind and (relation == "conflict" or p not in TRIVIAL)]
    wanted = rng.choice(choices)
    return wanted, rng.choice(_questions(wanted, by_topic))


@cache
def _questions(wanted: Preference, by_topic: bool) -> list[Question]:
    return [q for q in QUESTIONS if applies(wanted, q.topic) and held_out_topic(wanted.kind, q.topic) == by_topic]


def _others(scenario: Scenario) -> list[Preference]:
    """The preferences that the other tier's text may be about."""
    wanted = scenario.wanted
    assert wanted is not None
    if scenario.relation == "conflict":
        return opposites(wanted)
    if scenario.relation == "agree":
        return [p for p in _usable(scenario) if compatible(wanted, p)]
    if scenario.relation == "distractor":
        good = scenario.good()
        return [p for p in _usable(scenario) if p.kind != "opinion" and not run_check(p.check(), good)]
    return []


def _usable(scenario: Scenario) -> list[Preference]:
    assert scenario.wanted is not None
    return _partners(scenario.wanted.kind, scenario.question.topic, scenario.split == "combination")


@cache
def _partners(kind: str, topic: str, unseen: bool) -> list[Preference]:
    return [
        p
        for p in WORDINGS
        if p not in TRIVIAL
        and p.kind != kind
        and applies(p, topic)
        and not held_out_topic(p.kind, topic)
        and held_out_pair(kind, p.kind) == unseen
    ]


def _say(rng: random.Random, preference: Preference, question: Question, *, held_out: bool = False) -> str:
    about = question.topic if preference.kind == "refusal" else question.subject
    return rng.choice(wordings(preference, about, held_out=held_out))


def _say_other(rng: random.Random, scenario: Scenario) -> str:
    other, question = scenario.other, scenario.question
    assert other is not None
    if scenario.relation != "distractor":
        return _say(rng, other, question)
    if other.kind == "refusal":  # a real refusal, but of another topic
        elsewhere = rng.choice([t for t in QUESTION_TOPICS if t not in (question.topic, "opinion")])
        return _say(rng, other, replace(question, topic=elsewhere))
    return distraction(other, question.topic, rng.randrange(3))


def _draw_fillers(rng: random.Random, scenario: Scenario) -> dict[str, str]:
    assert scenario.wanted is not None
    fillers = {}
    for tier, texts in FILLERS.items():
        unseen = scenario.split == "persona" and tier == scenario.tier
        kind = scenario.wanted.kind
        choices = [text for index, text in enumerate(texts) if held_out_filler(kind, tier, index) == unseen]
        if unseen or rng.random() < 0.4:
            fillers[tier] = rng.choice(choices)
    return fillers
