"""The controls: each lacks a part of the row or of the labels."""

from dataclasses import replace

import pytest
import torch
from reward_toys import color_pairs, language_model, make_row, make_tokenizer
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import set_seed

from metaalign_rl.core.dataflow import LABELS
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.views import apply_view
from reward import RewardTraining, Scorer, evaluate, preference_blind, tier_blind, train
from reward.model import build, head, load
from reward.training.controls import modes_of, training_of, view_of
from reward.training.examples import collate, collate_shared, make_example
from reward.training.losses import preference_loss

OVERALL = LABELS.index("overall")
QUICK = RewardTraining(learning_rate=3e-3, batch_size=16, epochs=4, max_tokens=128, calibration_share=0.1)


# Views


def test_the_preference_blind_view_hides_the_meta_prompt():
    for row in preference_blind(color_pairs(20)):
        assert (row.system_info, row.user_info, row.tier) == ("", "", "dialog")
        assert set(row.labels["chosen"]) <= {"dialog", "overall"}


def test_the_tier_blind_view_is_the_same_for_both_rows_of_a_tier_flip():
    row = make_row(tier="system", system_info="say red", user_info="say blue", chosen="red", rejected="blue")
    flip = replace(row, tier="user", system_info="say blue", user_info="say red")
    assert tier_blind([row]) == tier_blind([flip])
    assert tier_blind([row])[0].system_info == "say blue\nsay red"


def test_the_tier_blind_view_of_a_single_text_hides_its_tier():
    row = make_row(tier="system", system_info="say red")
    assert tier_blind([row]) == tier_blind([make_row(tier="user", user_info="say red")])


def test_each_control_has_its_view_and_the_mode_overall():
    rows = color_pairs(4)
    assert apply_view(rows, view_of("tier_blind")) == tier_blind(rows)
    assert apply_view(rows, view_of("preference_blind")) == preference_blind(rows)
    assert apply_view(rows, view_of("scalar")) == apply_view(rows, view_of("reward")) == rows
    assert modes_of("scalar") == modes_of("tier_blind") == ("overall",)
    assert modes_of("reward") == ("tier", "overall", "composed")


# The scalar control


def examples(*rows):
    return [make_example(row, make_tokenizer(), 128) for row in rows]


LABELLED = color_pairs(2)[0]
UNLABELLED = make_row(tier="user", user_info="say red", chosen="red", rejected="blue")  # ranks `user` and `overall`
ALONE = make_row(response="red", labels={"response": {"dialog": True, "overall": False}})


@pytest.mark.parametrize("collate", [collate, collate_shared])
def test_the_scalar_control_gets_no_label_but_overall(collate):
    batch = collate(examples(LABELLED, UNLABELLED, ALONE), pad_token=0, trained_labels=("overall",))
    known = ~batch["labels"].isnan()
    assert known[:, OVERALL].tolist() == [True, True, False, False, True]
    assert known.sum() == 3
    assert batch["ranked"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]


def test_the_scalar_control_has_the_gradient_of_a_head_with_one_output():
    """So training one of four outputs is equivalent to training a single output."""
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    four = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    batch = collate(examples(LABELLED, UNLABELLED, ALONE), pad_token=0, trained_labels=("overall",))
    below, weight = hidden.clone().requires_grad_(), four.clone().requires_grad_()
    preference_loss(below @ weight.T, batch, RewardTraining())[0].backward()

    below_one, one = hidden.clone().requires_grad_(), four[OVERALL].clone().requires_grad_()
    scores = below_one @ one
    bt = -logsigmoid(torch.stack([scores[0] - scores[1], scores[2] - scores[3]])).mean()
    labelled = scores[[0, 1, 4]]
    (bt + binary_cross_entropy_with_logits(labelled, torch.tensor([1.0, 0.0, 0.0]))).backward()

    torch.testing.assert_close(below.grad, below_one.grad)
    torch.testing.assert_close(weight.grad[OVERALL], one.grad)
    assert not weight.grad[:OVERALL].any()


@pytest.fixture(scope="module")
def scalar(tmp_path_factory):
    """A scalar control trained on `color_pairs`, half of them without labels."""
    rows = [replace(row, labels={}) if number % 4 < 2 else row for number, row in enumerate(color_pairs(600))]
    folder = tmp_path_factory.mktemp("scalar") / "scalar"
    result = train(training_of("scalar", QUICK), rows, None, language_model(), folder)
    return folder, result


def test_the_scalar_control_learns_the_rule_from_overall_alone(scalar):
    report = evaluate(
        Scorer.from_pretrained(scalar[0], device="cpu", dtype="float32"), color_pairs(200, seed=2), "overall"
    )
    assert report["accuracy"] > 0.9
    assert report["conflict"]["accuracy"] > 0.9


def test_training_the_scalar_control_leaves_the_other_labels_unchanged(scalar):
    folder, result = scalar
    set_seed(QUICK.seed)
    initial = head(build(language_model())[0]).weight
    trained = head(load(folder, "cpu", None)[0]).weight
    assert torch.equal(trained[:OVERALL], initial[:OVERALL])
    assert not torch.allclose(trained[OVERALL], initial[OVERALL])
    assert {label: result["temperature"][label] for label in LABELS[:OVERALL]} == dict.fromkeys(LABELS[:OVERALL], 1.0)
    assert result["temperature"]["overall"] != 1.0


def test_only_the_scalar_control_changes_the_training_settings():
    assert training_of("tier_blind", QUICK) == QUICK
    assert training_of("scalar", QUICK) == replace(QUICK, labels="overall")
    with pytest.raises(UserError, match="labels: expected one of all, overall, found 'user'"):
        RewardTraining(labels="user")
