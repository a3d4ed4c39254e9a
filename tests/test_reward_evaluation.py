"""The evaluation of a reward model: metrics on pairs, and calibration."""

from math import exp

import pytest
import torch
from reward_toys import color_pairs, make_row

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.refusals import is_refusal, wants_refusal
from metaalign_rl.data.world import build
from reward import MODES, Score, calibration_error, evaluate, evaluate_modes, fit_temperature
from reward.evaluation.calibration import reliability


class RuleScorer:
    """A scorer that applies a function to the row instead of a model."""

    def __init__(self, rule):
        self.rule = rule
        self.passes = 0

    def encode(self, row, place):
        return row

    def score_tokens(self, rows, batch_tokens):
        self.passes += 1
        return [self.rule(row) for row in rows]


def obeys(row):
    """Scores by the rule of `color_pairs`."""
    tiers = {tier: 3.0 if row.response in text else -3.0 for tier, text in tier_texts(row).items()}
    governing = tiers["system"] if row.system_info else tiers["user"]
    return Score(overall=governing, tiers={**tiers, "dialog": 2.0})


def prefers_red(row):
    return score_of(1.0 if row.response == "red" else -1.0)


def score_of(overall):
    """A score with this `overall` and the same logits for every tier."""
    return Score(overall=overall, tiers={"system": 0.0, "user": 0.0, "dialog": 0.0})


def tier_texts(row):
    return {"system": row.system_info, "user": row.user_info}


@pytest.mark.parametrize("mode", ["tier", "overall", "composed"])
def test_a_scorer_that_knows_the_rule_is_always_correct(mode):
    report = evaluate(RuleScorer(obeys), color_pairs(200), mode)
    assert report["mode"] == mode
    assert report["pairs"] == 200
    assert report["accuracy"] == report["conflict"]["accuracy"] == report["flip"]["accuracy"] == 1
    assert set(report["by_relation"]) == {"agree", "conflict", "system_only", "user_only"}
    assert sum(group["pairs"] for group in report["by_relation"].values()) == 200
    assert report["by_family"] == {"priority": {"accuracy": 1.0, "pairs": 200}}
    assert all(cells["one"] == cells["neither"] == 0 for cells in report["flip_matrix"].values())
    assert sum(cells["both"] for cells in report["flip_matrix"].values()) == report["flip"]["groups"]


def test_a_scorer_that_ignores_the_preference_is_correct_on_half_the_pairs_and_no_flip():
    report = evaluate(RuleScorer(prefers_red), color_pairs(200), "overall")
    assert report["accuracy"] == 0.5
    assert report["flip"] == {"accuracy": 0.0, "groups": 100}
    assert sum(cells["one"] for cells in report["flip_matrix"].values()) == 100
    assert report["tier_flip"]["accuracy"] == 0.0
    assert report["tier_flip"]["groups"] == report["conflict"]["pairs"] / 2


def test_a_tie_is_wrong_and_a_metric_over_no_data_is_null():
    row = make_row(chosen="stone", rejected="blue", tags={"flip": "alone", "kind": "color", "split": "paraphrase"})
    report = evaluate(RuleScorer(prefers_red), [row], "overall")
    assert report["accuracy"] == 0
    assert report["flip"] == {"accuracy": None, "groups": 0}
    assert report["conflict"] == report["distractor"] == {"accuracy": None, "pairs": 0}
    assert report["consistency"] == {"accuracy": None, "alike": None, "groups": 0}
    assert report["by_kind"] == {"color": {"accuracy": 0.0, "pairs": 1}}
    assert sum(found["pairs"] for found in report["by_length"].values()) == report["pairs"]
    assert report["by_split"] == {"paraphrase": {"accuracy": 0.0, "pairs": 1}}
    assert report["calibration"] == {}


def test_calibration_is_reported_for_each_label():
    rows = [
        make_row(id="a", chosen="red", rejected="blue", labels={"rejected": {"overall": True}}),
        make_row(id="b", response="red", labels={"response": {"overall": True, "user": False}}),
    ]
    table = evaluate(RuleScorer(prefers_red), rows, "overall")["calibration"]
    p = 1 / (1 + exp(-1))
    assert table["overall"]["answers"] == 2
    assert table["overall"]["agreement"] == 0.5
    assert table["overall"]["ece"] == pytest.approx(((1 - p) + p) / 2)
    assert table["user"]["curve"] == [{"p": 0.5, "share": 0.0, "answers": 1}]
    assert (table["user"]["ece"], table["user"]["agreement"], table["user"]["answers"]) == (0.5, 0.0, 1)


def test_all_modes_share_one_scoring_of_the_rows():
    scorer, rows = RuleScorer(obeys), color_pairs(40)
    reports = evaluate_modes(scorer, rows, MODES)
    assert scorer.passes == 1
    assert reports == {mode: evaluate(RuleScorer(obeys), rows, mode) for mode in MODES}


def test_distractors_have_their_own_accuracy():
    rows = [make_row(id="a", relation="distractor", chosen="red", rejected="blue"), *color_pairs(20)]
    assert evaluate(RuleScorer(prefers_red), rows, "overall")["distractor"] == {"accuracy": 1.0, "pairs": 1}


# Paraphrases


def wordings(name, **values):
    """One preference for red in three wordings, two of which contain the word."""
    texts = ("say red", "red please", "not blue")
    pair = {"chosen": "red", "rejected": "blue"} | values
    return [
        make_row(id=f"{name}-{number}", system_info=text, tags={"paraphrases": name}, **pair)
        for number, text in enumerate(texts)
    ]


def reads_the_word(row):
    return score_of(1.0 if row.response in row.system_info else -1.0)


def test_consistency_counts_groups_that_are_correct_or_equal_in_all_wordings():
    rows = [*wordings("one"), *wordings("other", chosen="blue", rejected="red")]
    assert evaluate(RuleScorer(prefers_red), rows, "overall")["consistency"] == {
        "accuracy": 0.5,
        "alike": 1.0,
        "groups": 2,
    }
    assert evaluate(RuleScorer(reads_the_word), rows, "overall")["consistency"] == {
        "accuracy": 0.0,
        "alike": 0.0,
        "groups": 2,
    }


# Refusals, in the built-in world


@pytest.fixture(scope="module")
def world_pairs():
    return build.pairs(0, 300, held_out=True)


def refuses(sign):
    return lambda row: score_of(sign if is_refusal(row.response) else -sign)


def test_a_scorer_against_refusals_prefers_none_wanted_or_not(world_pairs):
    found = evaluate(RuleScorer(refuses(-1.0)), world_pairs, "overall")["refusals"]
    assert found["wanted"]["preferred"] == found["unwanted"]["preferred"] == 0
    assert found["wanted"]["pairs"] > 5 < found["unwanted"]["pairs"]


def test_a_scorer_for_refusals_prefers_all_wanted_or_not(world_pairs):
    found = evaluate(RuleScorer(refuses(1.0)), world_pairs, "overall")["refusals"]
    assert found["wanted"]["preferred"] == found["unwanted"]["preferred"] == 1


def test_the_better_answer_refuses_exactly_if_the_row_asks_for_a_refusal(world_pairs):
    one_refuses = [row for row in world_pairs if is_refusal(row.chosen) != is_refusal(row.rejected)]
    assert all(is_refusal(row.chosen) == wants_refusal(row) for row in one_refuses)


def test_pairs_without_checks_are_left_out_of_refusals():
    row = make_row(chosen="red", rejected="sorry, i can not talk about red.")
    nothing = {"preferred": None, "pairs": 0}
    assert evaluate(RuleScorer(prefers_red), [row], "overall")["refusals"] == {"wanted": nothing, "unwanted": nothing}


# Length


def long_or_short():
    """Three pairs; in two of them the better answer is longer."""
    pairs = [("red red red", "blue"), ("red red red", "blue"), ("red", "blue blue blue")]
    return [make_row(id=str(n), chosen=chosen, rejected=rejected) for n, (chosen, rejected) in enumerate(pairs)]


def test_a_model_that_is_always_correct_has_the_length_bias_of_the_data():
    scorer = RuleScorer(lambda row: score_of(9.0 if "red" in row.response else -9.0))
    bias = evaluate(scorer, long_or_short(), "overall")
    assert bias["length_bias"]["model"] == pytest.approx(bias["length_bias"]["gold"])
    assert 0 < bias["length_bias"]["gold"] < 1


@pytest.mark.parametrize(("weight", "sign"), [(0.1, 1), (-0.1, -1)])
def test_a_preference_for_length_shows_in_the_length_bias(weight, sign):
    bias = evaluate(RuleScorer(lambda row: score_of(weight * len(row.response))), long_or_short(), "overall")
    assert bias["length_bias"]["model"] == pytest.approx(sign, abs=0.05)


def test_answers_of_equal_length_have_no_length_bias():
    rows = [make_row(chosen="red", rejected="tan")]
    assert evaluate(RuleScorer(prefers_red), rows, "overall")["length_bias"] == {"model": None, "gold": None}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([make_row()], "row 'row': expected .* found nothing to evaluate"),
        ([], "rows: expected some with 'chosen' and 'rejected', found none among 0"),
        (
            [make_row(response="red", labels={"response": {"user": True}})],
            "rows: expected some with 'chosen' and 'rejected', found none among 1",
        ),
        ([make_row(chosen="a", rejected="b", labels={"response": {"user": True}})], "has no 'response'"),
        ([make_row(chosen="a", rejected="b")] * 2, "row 'row': .*twice"),
    ],
)
def test_rows_that_cannot_be_evaluated_are_an_error(rows, message):
    with pytest.raises(UserError, match=message):
        evaluate(RuleScorer(prefers_red), rows)


# Calibration


def test_the_temperature_reverses_a_known_scale():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, generator=generator) * 2
    labels = torch.bernoulli(logits.sigmoid(), generator=generator)
    for factor in (0.2, 1.0, 5.0):
        assert fit_temperature(logits * factor, labels) == pytest.approx(factor, rel=0.05)


def test_a_fitted_temperature_lowers_the_calibration_error():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5_000, generator=generator) * 2
    labels = torch.bernoulli(logits.sigmoid(), generator=generator)
    confident = logits * 4
    fitted = confident / fit_temperature(confident, labels)
    before, after = (calibration_error(x.sigmoid().tolist(), labels.bool().tolist()) for x in (confident, fitted))
    assert before > 0.1
    assert after < 0.03


def test_unknown_labels_are_ignored_and_equal_labels_give_temperature_1():
    logits = torch.tensor([4.0, -4.0, 3.0, -3.0])
    nan = torch.nan
    assert fit_temperature(logits, torch.tensor([1.0, 1.0, nan, nan])) == 1.0
    assert fit_temperature(logits, torch.full((4,), nan)) == 1.0
    both = fit_temperature(logits[:2], torch.tensor([1.0, 0.0]))
    assert fit_temperature(logits, torch.tensor([1.0, 0.0, nan, nan])) == pytest.approx(both)


def test_a_few_separated_answers_do_not_make_the_model_confident():
    logits = torch.tensor([0.5, -0.5, 0.4, -0.4])
    temperature = fit_temperature(logits, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert (logits / temperature).sigmoid().max() < 0.85


def test_the_reliability_curve_has_a_point_for_each_bin_with_answers():
    curve = reliability([0.05, 0.05, 0.95, 1.0], [False, True, True, True])
    assert curve == [
        {"p": 0.05, "share": 0.5, "answers": 2},
        {"p": pytest.approx(0.975), "share": 1.0, "answers": 2},
    ]


def test_the_calibration_error_of_perfect_and_of_wrong_probabilities():
    assert calibration_error([0.0, 1.0, 0.5, 0.5], [False, True, True, False]) == 0
    assert calibration_error([1.0, 1.0], [False, True]) == 0.5
