"""Evaluation, calibration and the controls' views."""

from dataclasses import replace
from math import exp

import pytest
import torch
from reward_toys import color_pairs, make_row

from metaalign_rl.errors import UserError
from reward import Score, calibration_error, evaluate, fit_temperature, preference_blind, tier_blind
from reward.calibration import reliability


class RuleScorer:
    """Scores by a function of the row instead of a model."""

    def __init__(self, rule):
        self.rule = rule

    def encode(self, row, place):
        return row

    def score_tokens(self, rows, batch_tokens):
        return [self.rule(row) for row in rows]


def obeys(row):
    """Knows the rule of `color_pairs`."""
    tiers = {tier: 3.0 if row.response in text else -3.0 for tier, text in said(row).items()}
    governing = tiers["system"] if row.system_info else tiers["user"]
    return Score(overall=governing, tiers={**tiers, "dialog": 2.0})


def likes_red(row):
    return Score(overall=1.0 if row.response == "red" else -1.0, tiers={"system": 0.0, "user": 0.0, "dialog": 0.0})


def said(row):
    return {"system": row.system_info, "user": row.user_info}


@pytest.mark.parametrize("mode", ["tier", "overall", "composed"])
def test_a_scorer_that_knows_the_rule_is_right_everywhere(mode):
    report = evaluate(RuleScorer(obeys), color_pairs(200), mode)
    assert report["mode"] == mode
    assert report["pairs"] == 200
    assert report["accuracy"] == report["conflict"]["accuracy"] == report["flip"]["accuracy"] == 1
    assert set(report["by_relation"]) == {"agree", "conflict", "system_only", "user_only"}
    assert sum(group["pairs"] for group in report["by_relation"].values()) == 200
    assert report["by_family"] == {"priority": {"accuracy": 1.0, "pairs": 200}}
    assert all(cells["one"] == cells["neither"] == 0 for cells in report["flip_matrix"].values())
    assert sum(cells["both"] for cells in report["flip_matrix"].values()) == report["flip"]["groups"]


def test_a_taste_without_a_preference_is_right_on_half_the_pairs_and_no_flip():
    report = evaluate(RuleScorer(likes_red), color_pairs(200), "overall")
    assert report["accuracy"] == 0.5
    assert report["flip"] == {"accuracy": 0.0, "groups": 100}
    assert sum(cells["one"] for cells in report["flip_matrix"].values()) == 100
    assert report["tier_flip"]["accuracy"] == 0.0
    assert report["tier_flip"]["groups"] == report["conflict"]["pairs"] / 2


def test_a_tie_is_not_right_and_a_figure_over_nothing_is_null():
    row = make_row(chosen="stone", rejected="blue", tags={"flip": "alone", "kind": "color", "split": "paraphrase"})
    report = evaluate(RuleScorer(likes_red), [row], "overall")
    assert report["accuracy"] == 0
    assert report["flip"] == {"accuracy": None, "groups": 0}
    assert report["conflict"] == {"accuracy": None, "pairs": 0}
    assert report["by_kind"] == {"color": {"accuracy": 0.0, "pairs": 1}}
    assert sum(found["pairs"] for found in report["by_length"].values()) == report["pairs"]
    assert report["by_split"] == {"paraphrase": {"accuracy": 0.0, "pairs": 1}}
    assert report["calibration"] == {}


def test_labelled_answers_show_calibration_label_by_label():
    rows = [
        make_row(id="a", chosen="red", rejected="blue", labels={"rejected": {"overall": True}}),
        make_row(id="b", response="red", labels={"response": {"overall": True, "user": False}}),
    ]
    table = evaluate(RuleScorer(likes_red), rows, "overall")["calibration"]
    p = 1 / (1 + exp(-1))
    assert table["overall"]["answers"] == 2
    assert table["overall"]["agreement"] == 0.5
    assert table["overall"]["ece"] == pytest.approx(((1 - p) + p) / 2)
    assert table["user"]["curve"] == [{"p": 0.5, "share": 0.0, "answers": 1}]
    assert (table["user"]["ece"], table["user"]["agreement"], table["user"]["answers"]) == (0.5, 0.0, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([make_row()], "row 'row': nothing to evaluate"),
        ([], "no row has 'chosen' and 'rejected'"),
        (
            [make_row(response="red", labels={"response": {"user": True}})],
            "no row has 'chosen' and 'rejected'",
        ),
        ([make_row(chosen="a", rejected="b", labels={"response": {"user": True}})], "has no 'response'"),
        ([make_row(chosen="a", rejected="b")] * 2, "row 'row': .*twice"),
    ],
)
def test_rows_that_cannot_be_evaluated_are_an_error(rows, message):
    with pytest.raises(UserError, match=message):
        evaluate(RuleScorer(likes_red), rows)


# Calibration


def test_the_temperature_undoes_a_known_overconfidence():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, generator=generator) * 2
    labels = torch.bernoulli(logits.sigmoid(), generator=generator)
    for factor in (0.2, 1.0, 5.0):
        assert fit_temperature(logits * factor, labels) == pytest.approx(factor, rel=0.05)


def test_calibration_brings_probabilities_to_frequencies():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5_000, generator=generator) * 2
    labels = torch.bernoulli(logits.sigmoid(), generator=generator)
    sure = logits * 4
    fitted = sure / fit_temperature(sure, labels)
    before, after = (calibration_error(x.sigmoid().tolist(), labels.bool().tolist()) for x in (sure, fitted))
    assert before > 0.1
    assert after < 0.03


def test_missing_labels_are_passed_over_and_labels_of_one_kind_say_nothing():
    logits = torch.tensor([4.0, -4.0, 3.0, -3.0])
    nan = torch.nan
    assert fit_temperature(logits, torch.tensor([1.0, 1.0, nan, nan])) == 1.0
    assert fit_temperature(logits, torch.full((4,), nan)) == 1.0
    both = fit_temperature(logits[:2], torch.tensor([1.0, 0.0]))
    assert fit_temperature(logits, torch.tensor([1.0, 0.0, nan, nan])) == pytest.approx(both)


def test_a_few_separated_answers_do_not_make_the_model_sure():
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


# Controls


def test_the_preference_blind_view_hides_the_meta_prompt():
    for row in preference_blind(color_pairs(20)):
        assert (row.system_info, row.user_info, row.tier) == ("", "", "dialog")
        assert set(row.labels["chosen"]) <= {"dialog", "overall"}


def test_the_tier_blind_view_is_the_same_for_both_sides_of_a_tier_flip():
    row = make_row(tier="system", system_info="say red", user_info="say blue", chosen="red", rejected="blue")
    flip = replace(row, tier="user", system_info="say blue", user_info="say red")
    assert tier_blind([row]) == tier_blind([flip])
    assert tier_blind([row])[0].system_info == "say blue\nsay red"


def test_the_tier_blind_view_of_a_single_text_hides_whose_it_is():
    row = make_row(tier="system", system_info="say red")
    assert tier_blind([row]) == tier_blind([make_row(tier="user", user_info="say red")])
