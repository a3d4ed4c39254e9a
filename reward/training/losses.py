"""The reward model's losses: on pairs, on absolute labels, and on the tokens of an answer."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from metaalign_rl.core.dataflow import LABELS
from reward.training.config import RewardTraining
from reward.training.examples import RewardBatch


def target_counts(batch: RewardBatch) -> Tensor:
    """The denominators of a batch's means, [4]: ranked labels, known labels, known labels of tokens, pairs."""
    known = ~batch["labels"].isnan()
    of_tokens = known[_texts_of_tokens(batch)] if "text_of_token" in batch else known[:0]
    sums = [(batch["ranked"] != 0).sum(), known.sum(), of_tokens.sum()]
    return torch.stack([*sums, sums[0].new_tensor(len(batch["ranked"]))]).float()


def preference_loss(
    logits: Tensor, batch: RewardBatch, config: RewardTraining, counts: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley-Terry on pairs plus binary cross-entropy on absolute labels, both as means over the known labels.

    Δ is the score of the better answer minus the score of the worse one, in a label that the pair ranks. The margin m
    is `config.margin` times the pair's strength (Llama 2, arXiv:2307.09288, eq. 2). ε is `config.label_smoothing`, the
    assumed share of wrong labels (conservative DPO: Mitchell 2023, https://ericmitchell.ai/cdpo.pdf). The losses are
    expected values if each label is wrong with probability ε:

        bt  = -(1 - ε) log σ(Δ - m) - ε log σ(-Δ - m)
        bce = -y log σ(s) - (1 - y) log σ(-s)    with y = 1 - ε for a true label and y = ε for a false one

    Args:
        logits: [texts, 4].
        batch: from `collate` or `collate_shared`.
        counts: denominators that replace the batch's own `target_counts`, for a batch that is one part of an update.
            With the update's counts divided by its number of parts, the mean of the parts' losses is the update's loss.

    Returns:
        The weighted sum, and the detached metrics `bt`, `bce` and `accuracy`: the share of pairs whose chosen answer
        has the higher `overall`. A term without any known label is 0.
    """
    n_ranked, n_labels, _, n_pairs = target_counts(batch) if counts is None else counts
    gap = logits[batch["chosen"]] - logits[batch["rejected"]]
    ranked, margin = batch["ranked"], config.margin * batch["strength"][:, None]
    smoothing = config.label_smoothing
    losses = -(1 - smoothing) * logsigmoid(ranked * gap - margin) - smoothing * logsigmoid(-ranked * gap - margin)
    bt = _mean(losses, ranked != 0, n_ranked)
    bce = _cross_entropy(logits, batch["labels"], config, n_labels)
    correct = gap[:, LABELS.index("overall")] > 0
    accuracy = _mean(correct.float(), torch.ones_like(correct), n_pairs)
    return config.bt_weight * bt + config.bce_weight * bce, {
        "bt": bt.detach(),
        "bce": bce.detach(),
        "accuracy": accuracy,
    }


def token_loss(logits: Tensor, batch: RewardBatch, config: RewardTraining, counts: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of the answers' labels at single tokens, as a mean over labels and tokens.

    A single token can decide what an answer is worth, long before the last one. A verifier learns faster if it predicts
    the label at every token (Cobbe et al. 2021, arXiv:2110.14168, section 4.2).

    Args:
        logits: [tokens, 4], for the tokens with `text_of_token` ≥ 0.
        batch: from `collate_shared`.
        counts: see `preference_loss`.
    """
    n_tokens = (target_counts(batch) if counts is None else counts)[2]
    return _cross_entropy(logits, batch["labels"][_texts_of_tokens(batch)], config, n_tokens)


def _texts_of_tokens(batch: RewardBatch) -> Tensor:
    """The non-negative entries of `text_of_token`, [tokens]."""
    return batch["text_of_token"][batch["text_of_token"] >= 0]


def _cross_entropy(logits: Tensor, labels: Tensor, config: RewardTraining, count: Tensor) -> Tensor:
    smoothing = config.label_smoothing
    targets = labels.nan_to_num() * (1 - 2 * smoothing) + smoothing
    losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return _mean(losses, ~labels.isnan(), count)


def _mean(values: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """The sum of the values inside the mask, divided by `count`; 0 if that is 0."""
    return torch.where(mask, values, 0.0).sum() / torch.where(count > 0, count, 1.0)
