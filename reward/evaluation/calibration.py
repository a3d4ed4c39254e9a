"""Calibration: fit a temperature to one label, and measure how far probabilities are from frequencies."""

from collections.abc import Sequence
from math import exp, log, sqrt

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.05, 20.0
_SEARCH_STEPS = 40  # steps of a golden-section search; each keeps 0.618 of the interval


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature T, from 0.05 to 20, that minimises the binary cross-entropy of sigmoid(logits / T).

    The targets are Platt's (1999): (n + 1) / (n + 2) for each of n true labels, and 1 / (n + 2) for each of n false
    labels. So a few answers that happen to be separated perfectly do not make the model fully confident. The loss is
    convex in 1 / T, so its single minimum is found by golden-section search.

    Args:
        logits: [answers].
        labels: [answers], 1, 0 or NaN (unknown).

    Returns:
        T; 1 if the known labels are all equal, because they do not determine a scale.
    """
    known = ~labels.isnan()
    logits, labels = logits[known].double(), labels[known].double()
    if not 0 < labels.sum() < len(labels):
        return 1.0

    n_true = labels.sum().item()
    targets = torch.where(labels == 1, (n_true + 1) / (n_true + 2), 1 / (len(labels) - n_true + 2))

    def loss(log_temperature: float) -> float:
        return binary_cross_entropy_with_logits(logits / exp(log_temperature), targets).item()

    golden = (sqrt(5) - 1) / 2
    low, high = log(_MIN_TEMPERATURE), log(_MAX_TEMPERATURE)
    for _ in range(_SEARCH_STEPS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return exp((low + high) / 2)


def reliability(probabilities: Sequence[float], labels: Sequence[bool], bins: int = 10) -> list[dict[str, float]]:
    """The reliability curve over bins of equal width.

    Returns:
        For each bin that has answers: `p`, their mean probability; `share`, the share of true labels among them; and
        `answers`, their number.
    """
    curve = []
    for number in range(bins):
        inside = [i for i, p in enumerate(probabilities) if min(int(p * bins), bins - 1) == number]
        if inside:
            p, share = (sum(float(values[i]) for i in inside) / len(inside) for values in (probabilities, labels))
            curve.append({"p": p, "share": share, "answers": len(inside)})
    return curve


def calibration_error(probabilities: Sequence[float], labels: Sequence[bool], bins: int = 10) -> float:
    """The expected calibration error (Guo et al. 2017, for a binary label), from 0 to 1.

    It is the mean distance of the reliability curve from the diagonal, weighted by the answers per bin.
    """
    curve = reliability(probabilities, labels, bins)
    return sum(point["answers"] * abs(point["p"] - point["share"]) for point in curve) / len(probabilities)
