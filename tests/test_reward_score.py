"""The score of one answer, and how its labels combine into one probability."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_toys import make_row

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.views import active_tiers
from reward import MODES, Score, combine
from reward.score import log_combine

probability = st.floats(0, 1)
probabilities = st.fixed_dictionaries(
    {"system": probability, "user": probability, "dialog": probability, "overall": probability}
)
rows = st.builds(
    lambda tier, system, user: make_row(tier=tier, system_info=system, user_info=user),
    st.sampled_from(["system", "user", "dialog"]),
    st.sampled_from(["", " ", "be loud"]),
    st.sampled_from(["", "be soft"]),
).filter(lambda row: row.tier == "dialog" or row.tier in active_tiers(row))


def test_importing_the_package_loads_neither_torch_nor_transformers():
    check = "import sys, reward, reward.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_the_package_has_its_public_names_and_no_others():
    import reward

    assert all(hasattr(reward, name) for name in reward.__all__)
    assert not hasattr(reward, "nothing")


def test_probabilities_are_the_sigmoids_of_the_logits():
    score = Score(overall=0.0, tiers={"system": 1000.0, "user": -1000.0, "dialog": 1.0986123})
    assert score.probabilities == pytest.approx({"system": 1.0, "user": 0.0, "dialog": 0.75, "overall": 0.5})


P = {"system": 0.8, "user": 0.5, "dialog": 0.9, "overall": 0.3}


def test_mode_tier_multiplies_the_governing_tier_and_the_dialog():
    assert combine(P, make_row(tier="system", system_info="a"), "tier") == pytest.approx(0.8 * 0.9)
    assert combine(P, make_row(tier="user", user_info="b"), "tier") == pytest.approx(0.5 * 0.9)
    assert combine(P, make_row(tier="dialog"), "tier") == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("tier", "texts"), [("system", {}), ("user", {"user_info": " \n"}), ("user", {"system_info": "a"})]
)
def test_mode_tier_of_an_empty_governing_tier_is_an_error_and_not_a_number(tier, texts):
    with pytest.raises(UserError, match=f"row 'row': mode 'tier' .*expected a text in {tier}_info, found none"):
        combine(P, make_row(tier=tier, **texts), "tier")


def test_a_mode_that_reads_a_label_without_training_data_is_an_error_and_not_a_number():
    score = Score(1.0, {"system": 1.0, "user": 1.0, "dialog": 1.0}, untrained=frozenset({"dialog", "user"}))
    row = make_row(tier="system", system_info="a", user_info="b")
    assert combine(score, row, "overall") == pytest.approx(score.probabilities["overall"])
    with pytest.raises(UserError, match="mode 'tier': it reads dialog, but the reward model's training data had no"):
        combine(score, row, "tier")
    with pytest.raises(UserError, match="mode 'composed': it reads user, dialog"):
        combine(score, row, "composed")


def test_mode_overall_is_the_overall_probability():
    assert combine(P, make_row(tier="user"), "overall") == pytest.approx(0.3)


def test_mode_composed_weights_a_lower_tier_by_the_higher_ones():
    both = make_row(system_info="a", user_info="b")
    assert combine(P, both, "composed") == pytest.approx(0.9 * 0.8 * (1 - 0.5 * 0.8 * (1 - 0.5)))
    assert combine(P, make_row(user_info="b"), "composed") == pytest.approx(0.9 * 0.5)
    assert combine(P, make_row(), "composed") == pytest.approx(0.9)


def test_mode_composed_decides_a_conflict_by_priority():
    row = make_row(relation="conflict", system_info="red", user_info="blue")
    obeys_system = {"system": 0.95, "user": 0.05, "dialog": 0.9}
    obeys_user = {"system": 0.05, "user": 0.95, "dialog": 0.9}
    assert combine(obeys_system, row, "composed") > 0.4 > combine(obeys_user, row, "composed")


@given(probabilities, rows, st.sampled_from(MODES))
def test_the_combination_is_a_probability(p, row, mode):
    assert 0 <= combine(p, row, mode) <= 1


@given(
    probabilities,
    rows,
    st.sampled_from(MODES),
    st.sampled_from(["system", "user", "dialog", "overall"]),
    probability,
)
def test_a_higher_probability_of_a_label_never_lowers_the_combination(p, row, mode, label, higher):
    raised = {**p, label: max(p[label], higher)}
    assert combine(raised, row, mode) >= combine(p, row, mode) - 1e-12


@given(st.floats(-30, 30), st.floats(-30, 30), rows, st.sampled_from(MODES))
def test_a_score_and_its_probabilities_combine_to_the_same_value(one, other, row, mode):
    score = Score(overall=one, tiers={"system": other, "user": one, "dialog": other})
    assert combine(score, row, mode) == pytest.approx(combine(score.probabilities, row, mode), abs=1e-9)


def test_logarithms_still_rank_answers_whose_probabilities_round_to_one():
    row = make_row(tier="system", system_info="a", user_info="b")
    good, better = (Score(overall=x, tiers={"system": x, "user": x, "dialog": x}) for x in (40.0, 50.0))
    for mode in MODES:
        assert combine(good, row, mode) == combine(better, row, mode) == 1.0
        assert log_combine(good, row, mode) < log_combine(better, row, mode)


def test_an_unknown_mode_is_an_error_that_names_the_known_ones():
    message = "mode: expected one of tier, overall, composed, found 'overal'; did you mean 'overall'"
    with pytest.raises(UserError, match=message):
        combine(P, make_row(), "overal")
