"""The reward model's losses, compared with the formulas computed number by number."""

from math import exp, log

import pytest
import torch
from reward_toys import make_row, make_tokenizer

from metaalign_rl.core.dataflow import LABELS
from reward import RewardTraining
from reward.training.examples import collate, collate_shared, make_example
from reward.training.losses import preference_loss, target_counts, token_loss


def sigmoid(value):
    return 1 / (1 + exp(-value))


def examples_of(*rows):
    tokenizer = make_tokenizer()
    return [make_example(row, tokenizer, 128) for row in rows]


def test_the_loss_is_bradley_terry_plus_cross_entropy_over_the_known_labels():
    rows = [
        make_row(tier="user", chosen="red", rejected="blue", labels={"chosen": {"system": True}}),
        make_row(response="stone", labels={"response": {"overall": False}}),
    ]
    batch = collate(examples_of(*rows), pad_token=0)
    assert batch["input_ids"].shape[0] == 3
    logits = torch.tensor([[2.0, 1.0, 9.0, 0.5], [9.0, 0.0, 9.0, -0.5], [9.0, 9.0, 9.0, 1.0]])
    loss, metrics = preference_loss(logits, batch, RewardTraining(bt_weight=2.0, bce_weight=3.0))
    bt = -log(sigmoid(1.0))  # the gap in both user and overall
    bce = -(log(sigmoid(2.0)) + log(sigmoid(-1.0))) / 2
    assert metrics["bt"].item() == pytest.approx(bt)
    assert metrics["bce"].item() == pytest.approx(bce)
    assert metrics["accuracy"].item() == 1.0
    assert loss.item() == pytest.approx(2 * bt + 3 * bce)


def test_unknown_labels_have_no_gradient():
    batch = collate(examples_of(make_row(chosen="red", rejected="blue")), pad_token=0)
    logits = torch.zeros(2, 4, requires_grad=True)
    loss, _ = preference_loss(logits, batch, RewardTraining())
    loss.backward()
    assert loss.item() == pytest.approx(log(2))
    has_gradient = logits.grad.abs().sum(0) > 0
    assert has_gradient.tolist() == [label in ("dialog", "overall") for label in LABELS]


def test_a_batch_without_pairs_has_only_the_loss_on_labels():
    row = make_row(response="red", labels={"response": {"overall": True}})
    batch = collate(examples_of(row, row), pad_token=0)
    _, metrics = preference_loss(torch.zeros(2, 4), batch, RewardTraining())
    assert metrics["bt"].item() == 0
    assert metrics["bce"].item() == pytest.approx(log(2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [0.0, 0.75])
def test_margin_and_smoothing_give_the_expected_loss_over_wrong_labels(margin, smoothing):
    """In `user` the rejected answer is the better one; the second pair is half as strong."""
    labels = {"chosen": {"user": False, "overall": True}, "rejected": {"user": True, "overall": False}}
    rows = [
        make_row(tier="user", chosen="red", rejected="blue", labels=labels),
        make_row(chosen="red", rejected="blue", strength=0.5),
    ]
    batch = collate(examples_of(*rows), pad_token=0)
    logits = torch.tensor([[0.0, -1.0, 0.0, 0.5], [0.0, 0.3, 0.0, -0.5], [0.0, 0.0, 0.2, -0.4], [0.0, 0.0, 0.1, 0.4]])
    _, metrics = preference_loss(logits, batch, RewardTraining(margin=margin, label_smoothing=smoothing))

    gaps = [(1.3, margin), (1.0, margin), (0.1, margin / 2), (-0.8, margin / 2)]  # user, overall; dialog, overall
    bt = [-(1 - smoothing) * log(sigmoid(gap - m)) - smoothing * log(sigmoid(-gap - m)) for gap, m in gaps]
    scores = [(-1.0, False), (0.3, True), (0.5, True), (-0.5, False)]
    truths = [s if label else -s for s, label in scores]
    bce = [-(1 - smoothing) * log(sigmoid(s)) - smoothing * log(sigmoid(-s)) for s in truths]
    assert metrics["bt"].item() == pytest.approx(sum(bt) / 4)
    assert metrics["bce"].item() == pytest.approx(sum(bce) / 4)


@pytest.mark.parametrize(("weights", "score"), [((1.0, 0.0), log(9) / 2), ((0.0, 1.0), log(9))], ids=["bt", "bce"])
def test_with_smoothing_the_loss_is_lowest_at_the_smoothed_probability(weights, score):
    """The gradient is 0 at σ(gap) = 0.9 for a pair, and at σ(score) = 0.9 for a label."""
    labels = {"chosen": {"overall": True}, "rejected": {"overall": False}}
    batch = collate(examples_of(make_row(chosen="red", rejected="blue", labels=labels)), pad_token=0)
    logits = torch.tensor([[0.0, 0.0, 0.0, score], [0.0, 0.0, 0.0, -score]], requires_grad=True)
    config = RewardTraining(label_smoothing=0.1, bt_weight=weights[0], bce_weight=weights[1])
    preference_loss(logits, batch, config)[0].backward()
    assert logits.grad[:, LABELS.index("overall")].tolist() == pytest.approx([0, 0], abs=1e-6)


def test_the_mean_loss_of_an_updates_parts_is_the_updates_loss():
    """The parts have different numbers of labels; one part has none."""
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
    counts = torch.stack([target_counts(part) for part in parts]).mean(0)
    assert counts.tolist() == pytest.approx([target_counts(whole)[at].item() / 3 for at in range(4)])

    def losses(logits, batch, counts=None):
        at_tokens = logits[batch["text_of_token"][batch["text_of_token"] >= 0]]
        return preference_loss(logits, batch, config, counts)[0] + token_loss(at_tokens, batch, config, counts)

    by_part_losses = [losses(logits, part, counts) for logits, part in zip(by_part, parts, strict=True)]
    assert torch.stack(by_part_losses).mean().item() == pytest.approx(losses(scores, whole).item(), rel=1e-5)
