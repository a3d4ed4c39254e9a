"""The reward model's losses: on pairs, on absolute labels, and at each token of an answer."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from metaalign_rl.core.dataflow import LABELS
from reward.training.config import RewardTraining

Batch = dict[str, Tensor]


def count(batch: Batch) -> Tensor:
    """Over how many a batch's means are taken, [4]: ranks, labels, labels at judged tokens, pairs."""
    known = ~batch["labels"].isnan()
    tokens = known[_owners(batch)] if "judged" in batch else known[:0]
    labels = [(batch["ranked"] != 0).sum(), known.sum(), tokens.sum()]
    return torch.stack([*labels, labels[0].new_tensor(len(batch["ranked"]))]).float()


def preference_loss(
    logits: Tensor, batch: Batch, config: RewardTraining, counts: Tensor | None = None
) -> tuple[Tensor, Batch]:
    """Bradley-Terry on pairs plus binary cross-entropy on absolute labels: means over what is known.

    Δ is the gap, better minus worse, in a label that the pair ranks; m is `config.margin` times the pair's strength
    (Llama 2, arXiv:2307.09288, eq. 2); ε is `config.label_smoothing`, the share of labels taken to be wrong
    (conservative DPO: Mitchell 2023, https://ericmitchell.ai/cdpo.pdf). The losses are what is then to be expected:

        bt  = -(1 - ε) log σ(Δ - m) - ε log σ(-Δ - m)
        bce = -y log σ(s) - (1 - y) log σ(-s)    with y = 1 - ε for a label that is true and ε for one that is false.

    Args:
        logits: [texts, 4].
        batch: what `reward.examples.collate` makes.
        counts: what to divide sums by instead of the batch's own `count`, where it is a part of an update: the
            update's counts over the number of its parts make the mean of the parts' losses the update's.

    Returns:
        The weighted sum, and detached figures: `bt`, `bce` and `accuracy`, the share of pairs that `overall`
        ranks as the data do. A part without any label is 0.
    """
    ranks, labels, _, pairs = count(batch) if counts is None else counts
    gap = logits[batch["chosen"]] - logits[batch["rejected"]]
    ranked, margin = batch["ranked"], config.margin * batch["strength"][:, None]
    wrong = config.label_smoothing
    losses = -(1 - wrong) * logsigmoid(ranked * gap - margin) - wrong * logsigmoid(-ranked * gap - margin)
    bt = _mean(losses, ranked != 0, ranks)
    bce = _cross_entropy(logits, batch["labels"], config, labels)
    right = gap[:, LABELS.index("overall")] > 0
    accuracy = _mean(right.float(), torch.ones_like(right), pairs)
    return config.bt_weight * bt + config.bce_weight * bce, {
        "bt": bt.detach(),
        "bce": bce.detach(),
        "accuracy": accuracy,
    }


def token_loss(logits: Tensor, batch: Batch, config: RewardTraining, counts: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of an answer's labels at each of its judged tokens, a mean over labels and tokens.

    What an answer is worth shows at the token that decides it, long before the last one; a verifier learns faster when
    it is asked there too (Cobbe et al. 2021, arXiv:2110.14168, section 4.2).

    Args:
        logits: [judged tokens, 4].
        counts: as for `preference_loss`.
    """
    tokens = (count(batch) if counts is None else counts)[2]
    return _cross_entropy(logits, batch["labels"][_owners(batch)], config, tokens)


def _owners(batch: Batch) -> Tensor:
    """The text that each judged token belongs to, [judged tokens]."""
    return batch["judged"][batch["judged"] >= 0]


def _cross_entropy(logits: Tensor, labels: Tensor, config: RewardTraining, number: Tensor) -> Tensor:
    wrong = config.label_smoothing
    targets = labels.nan_to_num() * (1 - 2 * wrong) + wrong
    losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return _mean(losses, ~labels.isnan(), number)


def _mean(values: Tensor, mask: Tensor, number: Tensor) -> Tensor:
    """The sum of the values that the mask keeps over `number`; 0 where that is 0."""
    return torch.where(mask, values, 0.0).sum() / torch.where(number > 0, number, 1.0)
