"""The reward model's losses, against the same written out number by number."""

from math import exp, log

import pytest
import torch
from reward_toys import make_row, make_tokenizer

from metaalign_rl.core.dataflow import LABELS
from reward import RewardTraining
from reward.examples import collate, collate_shared, make_example
from reward.training.losses import count, preference_loss, token_loss


def sigmoid(value):
    return 1 / (1 + exp(-value))


def examples_of(*rows):
    tokenizer = make_tokenizer()
    return [make_example(row, tokenizer, 128) for row in rows]


def test_the_loss_is_bradley_terry_plus_cross_entropy_over_the_labels_that_are_known():
    rows = [
        make_row(tier="user", chosen="red", rejected="blue", labels={"chosen": {"system": True}}),
        make_row(response="stone", labels={"response": {"overall": False}}),
    ]
    batch = collate(examples_of(*rows), pad_token=0)
    assert batch["input_ids"].shape[0] == 3
    logits = torch.tensor([[2.0, 1.0, 9.0, 0.5], [9.0, 0.0, 9.0, -0.5], [9.0, 9.0, 9.0, 1.0]])
    loss, figures = preference_loss(logits, batch, RewardTraining(bt_weight=2.0, bce_weight=3.0))
    bt = -log(sigmoid(1.0))  # the gap in both user and overall
    bce = -(log(sigmoid(2.0)) + log(sigmoid(-1.0))) / 2
    assert figures["bt"].item() == pytest.approx(bt)
    assert figures["bce"].item() == pytest.approx(bce)
    assert figures["accuracy"].item() == 1.0
    assert loss.item() == pytest.approx(2 * bt + 3 * bce)


def test_labels_that_are_missing_move_nothing():
    batch = collate(examples_of(make_row(chosen="red", rejected="blue")), pad_token=0)
    logits = torch.zeros(2, 4, requires_grad=True)
    loss, _ = preference_loss(logits, batch, RewardTraining())
    loss.backward()
    assert loss.item() == pytest.approx(log(2))
    moved = logits.grad.abs().sum(0) > 0
    assert moved.tolist() == [label in ("dialog", "overall") for label in LABELS]


def test_a_batch_without_pairs_trains_its_labels_alone():
    row = make_row(response="red", labels={"response": {"overall": True}})
    batch = collate(examples_of(row, row), pad_token=0)
    _, figures = preference_loss(torch.zeros(2, 4), batch, RewardTraining())
    assert figures["bt"].item() == 0
    assert figures["bce"].item() == pytest.approx(log(2))


@pytest.mark.parametrize("wrong", [0.0, 0.1])
@pytest.mark.parametrize("margin", [0.0, 0.75])
def test_margin_and_smoothing_give_the_loss_to_expect_of_labels_that_may_be_wrong(margin, wrong):
    """In `user` the rejected answer is the better one; the second pair is half as strong."""
    labels = {"chosen": {"user": False, "overall": True}, "rejected": {"user": True, "overall": False}}
    rows = [
        make_row(tier="user", chosen="red", rejected="blue", labels=labels),
        make_row(chosen="red", rejected="blue", strength=0.5),
    ]
    batch = collate(examples_of(*rows), pad_token=0)
    logits = torch.tensor([[0.0, -1.0, 0.0, 0.5], [0.0, 0.3, 0.0, -0.5], [0.0, 0.0, 0.2, -0.4], [0.0, 0.0, 0.1, 0.4]])
    _, figures = preference_loss(logits, batch, RewardTraining(margin=margin, label_smoothing=wrong))

    gaps = [(1.3, margin), (1.0, margin), (0.1, margin / 2), (-0.8, margin / 2)]  # user, overall; dialog, overall
    bt = [-(1 - wrong) * log(sigmoid(gap - m)) - wrong * log(sigmoid(-gap - m)) for gap, m in gaps]
    scores = [(-1.0, False), (0.3, True), (0.5, True), (-0.5, False)]
    truths = [s if label else -s for s, label in scores]
    bce = [-(1 - wrong) * log(sigmoid(s)) - wrong * log(sigmoid(-s)) for s in truths]
    assert figures["bt"].item() == pytest.approx(sum(bt) / 4)
    assert figures["bce"].item() == pytest.approx(sum(bce) / 4)


@pytest.mark.parametrize(("weights", "score"), [((1.0, 0.0), log(9) / 2), ((0.0, 1.0), log(9))], ids=["bt", "bce"])
def test_smoothed_labels_are_met_best_by_a_model_that_is_as_sure_as_they_are(weights, score):
    """σ(gap) = 0.9 of a pair, σ(score) = 0.9 of a label."""
    labels = {"chosen": {"overall": True}, "rejected": {"overall": False}}
    batch = collate(examples_of(make_row(chosen="red", rejected="blue", labels=labels)), pad_token=0)
    logits = torch.tensor([[0.0, 0.0, 0.0, score], [0.0, 0.0, 0.0, -score]], requires_grad=True)
    config = RewardTraining(label_smoothing=0.1, bt_weight=weights[0], bce_weight=weights[1])
    preference_loss(logits, batch, config)[0].backward()
    assert logits.grad[:, LABELS.index("overall")].tolist() == pytest.approx([0, 0], abs=1e-6)


def test_parts_of_an_update_average_to_its_loss():
    """However unlike their numbers of labels are; one part knows none."""
    labels = {"chosen": {"overall": True, "user": True}, "rejected": {"overall": False}}
    rows = [
        make_row(chosen="red", rejected="blue"),
        make_row(tier="user", chosen="red stone", rejected="blue", labels=labels),
        make_row(response="stone", labels={"response": {"overall": False}}),
    ]
    examples, config = examples_of(*rows), RewardTraining(token_weight=1.0, margin=0.5, label_smoothing=0.1)
    whole = collate_shared(examples, pad_token=0)
    parts = [collate_shared([example], pad_token=0) for example in examples]
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    by_part = [scores[:2], scores[2:4], scores[4:]]
    counts = torch.stack([count(part) for part in parts]).mean(0)
    assert counts.tolist() == pytest.approx([count(whole)[at].item() / 3 for at in range(4)])

    def losses(logits, batch, counts=None):
        at_tokens = logits[batch["judged"][batch["judged"] >= 0]]
        return preference_loss(logits, batch, config, counts)[0] + token_loss(at_tokens, batch, config, counts)

    apart = [losses(logits, part, counts) for logits, part in zip(by_part, parts, strict=True)]
    assert torch.stack(apart).mean().item() == pytest.approx(losses(scores, whole).item(), rel=1e-5)
