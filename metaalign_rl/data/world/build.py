"""Builds the rows of the built-in world: demonstrations, pairs and prompts, for training and held out."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from metaalign_rl.core.dataflow import RELATIONS, Row
from metaalign_rl.data import gold
from metaalign_rl.data.checks import run_check
from metaalign_rl.data.world.preferences import Preference, compatible, opposites
from metaalign_rl.data.world.scenarios import HELD_OUT_SPLITS, Scenario, draw, say_tiers, style_of

# Demonstrations that do not follow: with no style, with the other tier's (or a random) style, or with a wrong answer.
STRAY_WEIGHTS = {"plain": 0.4, "astray": 0.4, "mistake": 0.2}
RELATION_WEIGHTS = dict(zip(RELATIONS, (0.16, 0.16, 0.17, 0.2, 0.16, 0.15), strict=True))
# Demonstrations contain fewer conflicts: the policy should learn from the reward how to settle them.
DEMONSTRATED_WEIGHTS = RELATION_WEIGHTS | {"conflict": 0.12}
# The kinds of pairs. The two answers, or the two rows of a flip, differ in:
#   value    the value of a preference
#   tier     the order of the tiers' texts
#   role     which tier's text is the distractor
#   plain    whether the preference is followed
#   partly   whether one of two preferences is not followed, or a distractor is
#   mistake  whether the answer is right
#   stutter  whether the answer is a correct sentence
# Hard kinds are more frequent in training: facts are learned one by one, and two preferences by pairs of kinds.
PAIR_WEIGHTS = {
    "value": 0.21,
    "tier": 0.14,
    "role": 0.16,
    "plain": 0.03,
    "partly": 0.18,
    "mistake": 0.24,
    "stutter": 0.04,
}
PAIR_RELATIONS: dict[str, Sequence[str]] = {
    "value": ("system_only", "user_only", "agree", "agree"),
    "tier": ("conflict",),
    "role": ("distractor",),
    "partly": ("agree", "distractor"),
    "mistake": (*RELATIONS, "neutral", "neutral"),  # few other pairs have no preference
}
HELD_OUT_PAIR_WEIGHTS = {
    "value": 0.44,
    "tier": 0.2,
    "role": 0.2,
    "plain": 0.02,
    "partly": 0.1,
    "mistake": 0.03,
    "stutter": 0.01,
}
PARAPHRASED = tuple(relation for relation in RELATIONS if relation != "neutral")
WAYS_TO_SAY = 4  # rows in a group of paraphrases


def demonstrations(seed: int, count: int, follow_rate: float) -> list[Row]:
    """Training rows with a `response`, which follows the governing preference in a share `follow_rate` of them."""
    rng = random.Random(f"demonstrations {seed}")
    rows = []
    for index in range(count):
        scenario = draw(rng, _relation(rng, DEMONSTRATED_WEIGHTS), "train")
        rows.append(replace(scenario.row(f"sft-{index}"), response=_demonstrate(rng, scenario, follow_rate)))
    return rows


def prompts(seed: int, count: int) -> list[Row]:
    """Training rows without answers, for PPO."""
    rng = random.Random(f"prompts {seed}")
    return [draw(rng, _relation(rng), "train").row(f"prompt-{index}") for index in range(count)]


def held_out_prompts(seed: int, count: int) -> list[Row]:
    """Held-out rows without answers, spread evenly over the relations and their held-out splits."""
    rng = random.Random(f"held out {seed}")
    cells = [(relation, split) for relation in RELATIONS for split in HELD_OUT_SPLITS if _possible(relation, split)]
    by_relation = [[cell for cell in cells if cell[0] == relation] for relation in RELATIONS]
    rows = []
    for index in range(count):
        options = by_relation[index % len(by_relation)]
        relation, split = options[index // len(by_relation) % len(options)]
        rows.append(draw(rng, relation, split).row(f"held-out-{index}"))
    return rows


def paraphrases(seed: int, wishes: int) -> list[Row]:
    """Held-out rows without answers, in groups with the same question and preferences in different wordings.

    `tags["paraphrases"]` names a row's group.

    Args:
        wishes: number of groups; each has `WAYS_TO_SAY` rows.
    """
    rng = random.Random(f"paraphrases {seed}")
    rows: list[Row] = []
    for wish in range(wishes):
        scenario = draw(rng, PARAPHRASED[wish % len(PARAPHRASED)], "topic" if wish % 2 else "persona")
        for index, said in enumerate(_in_other_words(rng, scenario)):
            row = said.row(f"paraphrase-{wish}-{index}")
            rows.append(replace(row, tags=row.tags | {"paraphrases": str(wish)}))
    return rows


def paraphrased_pairs(seed: int, wishes: int) -> list[Row]:
    """Held-out pairs, in groups that differ only in the wording of the governing preference.

    `tags["paraphrases"]` names a row's group. Two groups at a time are flips of each other, so that each answer is
    the better one equally often.

    Args:
        wishes: number of groups, rounded up to an even number; each has `WAYS_TO_SAY` rows.
    """
    rng = random.Random(f"paraphrased pairs {seed}")
    rows: list[Row] = []
    for flip in range((wishes + 1) // 2):
        scenario, partner = _draw_flip(rng, PARAPHRASED[flip % len(PARAPHRASED)], "topic" if flip % 2 else "persona")
        answers = scenario.good(), partner.good()
        for side, one, (good, bad) in (("a", scenario, answers), ("b", partner, answers[::-1])):
            for index, said in enumerate(_in_other_words(rng, one)):
                name = f"paraphrased-pair-{flip}-{index}"
                tags = {"paraphrases": f"{flip}-{side}", "flip": name, "flip_kind": "value"}
                row = said.row(f"{name}-{side}")
                rows.append(_label(replace(row, chosen=good, rejected=bad, tags=row.tags | tags)))
    return rows


def _draw_flip(rng: random.Random, relation: str, split: str) -> tuple[Scenario, Scenario]:
    """A scenario and its partner in a flip, for which the other answer is the better one."""
    drawn = (draw(rng, relation, split) for _ in range(100))
    return next((s, partner) for s in drawn if (partner := _partner(rng, s, "value")) is not None)


def _in_other_words(rng: random.Random, scenario: Scenario) -> list[Scenario]:
    """The scenario in `WAYS_TO_SAY` wordings of the governing preference, with the same text of the other tier.

    Every second wording is held out from training.
    """
    said: dict[str, Scenario] = {}
    while len(said) < WAYS_TO_SAY:
        reworded = replace(scenario, split="paraphrase" if len(said) % 2 == 1 else scenario.split)
        reworded = replace(reworded, said=scenario.said | {scenario.tier: say_tiers(rng, reworded)[scenario.tier]})
        said.setdefault(reworded.text("system") + reworded.text("user"), reworded)
    return list(said.values())


def pairs(seed: int, count: int, *, held_out: bool) -> list[Row]:
    """Labelled pairs for the reward model. Most are flips: two rows with the same answers and opposite labels."""
    rng = random.Random(f"pairs {seed} {held_out}")
    name = "held-out-pair" if held_out else "pair"
    rows: list[Row] = []
    weights = HELD_OUT_PAIR_WEIGHTS if held_out else PAIR_WEIGHTS
    while len(rows) < count:
        split = rng.choice(HELD_OUT_SPLITS) if held_out else "train"
        kind = rng.choices(list(weights), list(weights.values()))[0]
        rows.extend(_label(row) for row in _pairs(rng, kind, split, f"{name}-{len(rows)}"))
    return rows[:count]


def _relation(rng: random.Random, weights: dict[str, float] = RELATION_WEIGHTS) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _possible(relation: str, split: str) -> bool:
    if split == "combination":
        return relation in ("agree", "distractor")
    return relation != "neutral" or split == "persona"


def _demonstrate(rng: random.Random, scenario: Scenario, follow_rate: float) -> str:
    if rng.random() < follow_rate:
        return scenario.good()
    stray = rng.choices(list(STRAY_WEIGHTS), list(STRAY_WEIGHTS.values()))[0]
    if stray == "mistake":
        return scenario.mistake(rng)
    if stray == "plain":
        return scenario.plain()
    if scenario.other in (None, scenario.wanted):  # there is no other preference, so follow a random one
        return scenario.say(style_of(draw(rng, "system_only", "train").wanted) | {"refusal": "allow"})
    return scenario.astray()


def _pairs(rng: random.Random, kind: str, split: str, identity: str) -> Iterator[Row]:
    """One pair, or the two pairs of a flip."""
    relation = rng.choice(PAIR_RELATIONS[kind]) if kind in PAIR_RELATIONS else _relation(rng)
    if not _possible(relation, split):
        split = "persona"
    scenario = draw(rng, relation, split)
    if kind == "partly":  # the two tiers' preferences must differ and be compatible
        others = (draw(rng, relation, split) for _ in range(100))
        scenario = next(s for s in chain([scenario], others) if s.partly(rng))
    partner = _partner(rng, scenario, kind)
    if partner is not None:
        one, other = scenario.row(f"{identity}-a"), partner.row(f"{identity}-b")
        tags = {"flip": identity, "flip_kind": "tier" if kind == "tier" and relation == "conflict" else "value"}
        good, bad = scenario.good(), partner.good()
        yield replace(one, chosen=good, rejected=bad, tags=one.tags | tags)
        yield replace(other, chosen=bad, rejected=good, tags=other.tags | tags)
        return
    yield replace(scenario.row(identity), chosen=scenario.good(), rejected=_worse(rng, scenario, kind))


def _worse(rng: random.Random, scenario: Scenario, kind: str) -> str:
    """An answer that is worse than the good one in one way."""
    if kind == "stutter":
        return scenario.stutter(rng)
    other = scenario.partly(rng) if kind == "partly" else scenario.plain() if kind == "plain" else None
    if other is None or gold.judge(scenario.row("row"), other).strict:
        return scenario.mistake(rng)
    return other


def _partner(rng: random.Random, scenario: Scenario, kind: str) -> Scenario | None:
    """The partner of the scenario in a flip; None if pairs of this kind are not flips, or there is no partner."""
    if kind not in ("value", "tier", "role"):
        return None
    if scenario.relation == "conflict":  # only swap the two texts
        said = {"system": scenario.text("user"), "user": scenario.text("system")}
        return replace(scenario, wanted=scenario.other, other=scenario.wanted, said=said, fillers={})
    if scenario.relation == "distractor":
        return _swap_roles(rng, scenario)
    return _other_value(rng, scenario)


def _swap_roles(rng: random.Random, scenario: Scenario) -> Scenario | None:
    """The scenario with the governing preference and the distractor exchanged; both stay in their tiers."""
    assert scenario.wanted and scenario.other
    if scenario.wanted.kind == "opinion":
        return None
    swapped = replace(scenario, wanted=scenario.other, other=scenario.wanted, tier=scenario.other_tier)
    if run_check(scenario.wanted.check(), swapped.good()):  # for example, a refusal may pass it
        return None
    return replace(swapped, said=say_tiers(rng, swapped))


def _other_value(rng: random.Random, scenario: Scenario) -> Scenario | None:
    """The scenario with an opposite preference in the same tiers; None if there is none."""
    assert scenario.wanted
    together = scenario.other not in (None, scenario.wanted)
    values = [p for p in opposites(scenario.wanted) if not together or compatible(p, _other(scenario))]
    if not values:
        return None
    wanted = rng.choice(values)
    changed = replace(scenario, wanted=wanted, other=scenario.other if together else scenario.other and wanted)
    said = say_tiers(rng, changed)
    if together:
        said[scenario.other_tier] = scenario.said[scenario.other_tier]
    return replace(changed, said=said)


def _other(scenario: Scenario) -> Preference:
    assert scenario.other
    return scenario.other


def _label(row: Row) -> Row:
    assert row.chosen is not None and row.rejected is not None
    found = {"chosen": gold.labels(row, row.chosen), "rejected": gold.labels(row, row.rejected)}
    assert found["chosen"]["overall"] and not found["rejected"]["overall"], row
    return replace(row, labels=found)
