"""The built-in world: its checks agree with its answers, and held-out data never occur in training."""

import random
import re

import pytest

from metaalign_rl.core.dataflow import RELATIONS
from metaalign_rl.core.rows import parse_row
from metaalign_rl.data import gold
from metaalign_rl.data.world import build, probes
from metaalign_rl.data.world.answers import say
from metaalign_rl.data.world.facts import Question
from metaalign_rl.data.world.preferences import KINDS, WORDINGS, held_out_pair, wordings
from metaalign_rl.data.world.scenarios import HELD_OUT_SPLITS, draw

FRANCE = Question("what is the capital of france?", "countries", "france", "paris")

FOLLOW_RATE = 0.6


@pytest.fixture(scope="module")
def pairs():
    return build.pairs(0, 3000, held_out=False)


@pytest.fixture(scope="module")
def held_out_pairs():
    return build.pairs(0, 1200, held_out=True)


@pytest.mark.parametrize(
    ("style", "answer"),
    [
        ({}, "it is paris."),
        ({"case": "upper"}, "IT IS PARIS."),
        ({"length": "short"}, "just paris."),
        ({"tone": "casual"}, "hey, it is paris."),
        ({"format": "bullet", "ending": "good luck"}, "- it is paris. good luck."),
        ({"language": "french", "certainty": "hedge"}, "maybe c'est paris."),
        ({"refusal": "refuse"}, "sorry, i can not talk about countries."),
    ],
)
def test_an_answer_is_written_in_its_style(style, answer):
    assert say(FRANCE, style) == answer


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_checks_accept_the_good_answer_and_refuse_a_mistake(relation):
    rng = random.Random(relation)
    for _ in range(300):
        scenario = draw(rng, relation, "train")
        row = scenario.row("row")
        assert gold.judge(row, scenario.good()).strict, row
        assert not gold.judge(row, scenario.mistake(rng)).following, row
        assert not gold.judge(row, scenario.stutter(rng)).passes["dialog"], row


@pytest.mark.parametrize("relation", ["agree", "distractor"])
def test_an_answer_that_misses_a_preference_or_follows_a_distractor_is_right_but_not_strictly(relation):
    rng = random.Random(relation)
    scenarios = [draw(rng, relation, "train") for _ in range(300)]
    answers = [(scenario.row("row"), scenario.partly(rng)) for scenario in scenarios]
    verdicts = [gold.judge(row, answer) for row, answer in answers if answer is not None]
    assert len(verdicts) > 100
    assert all(verdict.passes["dialog"] and not verdict.strict for verdict in verdicts)


@pytest.mark.parametrize(
    "answer", ["", " ", "please please", "it is paris. it is paris.", "paris paris.", "it is rome."]
)
def test_an_empty_repeated_or_wrong_answer_never_follows(answer):
    rng = random.Random(0)
    for relation in RELATIONS:
        row = draw(rng, relation, "train").row("row")
        row.checks["dialog"] = {"name": "world.answers", "value": "paris"}
        assert not gold.judge(row, answer).following


def test_there_are_nine_kinds_of_preference():
    assert len(KINDS) == 9


def test_each_preference_has_many_paraphrases_and_some_are_held_out():
    for preference in WORDINGS:
        seen = set(wordings(preference, "music", held_out=False))
        unseen = set(wordings(preference, "music", held_out=True))
        assert len(seen) >= 10 and len(unseen) >= 3 and not seen & unseen


def test_held_out_rows_are_new_combinations_of_words_from_training():
    training = build.demonstrations(0, 20_000, FOLLOW_RATE)
    words = {word for row in training for word in _words(row)}
    texts = {(row.system_info, row.user_info, row.messages[0]["content"]) for row in training}
    for row in build.held_out_prompts(0, 600):
        assert set(_words(row)) <= words
        assert row.tags["split"] in HELD_OUT_SPLITS
        assert (row.system_info, row.user_info, row.messages[0]["content"]) not in texts


def test_a_held_out_pair_of_kinds_never_occurs_in_training():
    rng = random.Random(0)
    for relation in ("agree", "distractor"):
        for _ in range(500):
            scenario = draw(rng, relation, "train")
            if scenario.other != scenario.wanted:
                assert not held_out_pair(scenario.wanted.kind, scenario.other.kind)


def test_demonstrations_follow_at_the_configured_rate():
    scenario_rows = build.demonstrations(0, 6000, FOLLOW_RATE)
    governed = [row for row in scenario_rows if row.relation in ("system_only", "user_only")]
    share = sum(gold.judge(row, row.response).following for row in governed) / len(governed)
    assert FOLLOW_RATE - 0.03 <= share <= FOLLOW_RATE + 0.06  # some of the others follow by chance


def test_a_flip_has_the_same_answers_with_opposite_labels(pairs):
    flips: dict[str, list] = {}
    for row in pairs[:-1]:  # the last flip may be cut in two
        if "flip" in row.tags:
            flips.setdefault(row.tags["flip"], []).append(row)
    assert len(flips) > 500
    for one, other in (rows for rows in flips.values() if len(rows) == 2):
        assert (one.chosen, one.rejected) == (other.rejected, other.chosen)
        assert one.messages == other.messages
        if one.tags["flip_kind"] == "tier":
            assert (one.system_info, one.user_info) == (other.user_info, other.system_info)


def test_probes_that_do_not_read_the_preference_stay_near_chance(pairs, held_out_pairs):
    one_way = [row for row in held_out_pairs if not row.id.endswith("-b")]
    assert probes.length_probe(pairs, one_way) < 0.60
    assert probes.word_probe(pairs, one_way) < 0.60


def test_the_same_seed_gives_the_same_rows_and_another_seed_gives_others():
    assert build.demonstrations(1, 50, FOLLOW_RATE) == build.demonstrations(1, 50, FOLLOW_RATE)
    assert build.demonstrations(1, 50, FOLLOW_RATE) != build.demonstrations(2, 50, FOLLOW_RATE)


def test_every_row_fits_the_schema(pairs):
    for row in [*pairs[:200], *build.held_out_prompts(0, 60), *build.demonstrations(0, 60, FOLLOW_RATE)]:
        assert parse_row(row.to_json(), "row") == row


def _words(row):
    text = " ".join([row.system_info, row.user_info, row.messages[0]["content"]])
    return re.findall(r"[a-z']+", text)


def test_paraphrased_pairs_have_the_same_answers_and_the_preference_in_different_words() -> None:
    rows = build.paraphrased_pairs(0, 20)
    groups = {name: [row for row in rows if row.tags["paraphrases"] == name] for name in _tags(rows, "paraphrases")}
    assert [len(group) for group in groups.values()] == [4] * 20
    for group in groups.values():
        assert len({(row.system_info, row.user_info) for row in group}) == 4
        assert len({str((row.messages, row.chosen, row.rejected, row.checks, row.tier)) for row in group}) == 1
        assert sum(row.tags["split"] == "paraphrase" for row in group) == 2
    for flip in _tags(rows, "flip"):
        one, other = (row for row in rows if row.tags["flip"] == flip)
        assert (one.chosen, one.rejected) == (other.rejected, other.chosen)
    assert {row.relation for row in rows} == set(RELATIONS) - {"neutral"}
    assert all(row.labels["chosen"]["overall"] and not row.labels["rejected"]["overall"] for row in rows)
    assert len({row.id for row in rows}) == len(rows)


def _tags(rows, name):
    return list(dict.fromkeys(row.tags[name] for row in rows))


def test_paraphrases_express_one_preference_in_different_words() -> None:
    rows = build.paraphrases(0, 60)
    groups = {wish: [row for row in rows if row.tags["paraphrases"] == wish] for wish in map(str, range(60))}
    for group in groups.values():
        assert len({(row.system_info, row.user_info) for row in group}) == len(group) == 4
        assert len({str((row.messages, row.checks, row.tier, row.relation)) for row in group}) == 1
        assert {row.tags["split"] for row in group} > {"paraphrase"}
