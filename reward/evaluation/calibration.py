"""Calibration: a temperature for each label, and how far probabilities are from frequencies."""

from collections.abc import Sequence
from math import exp, log, sqrt

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

_COLDEST, _HOTTEST = 0.05, 20.0
_STEPS = 40  # golden-section steps, each of which leaves 0.618 of the interval


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature T, 0.05 to 20, that minimises the binary cross-entropy of sigmoid(logits / T).

    The targets are Platt's (1999): with n true labels (n + 1) / (n + 2) and with n false ones 1 / (n + 2), so
    that a few answers which happen to be separated perfectly do not make the model perfectly sure. The loss
    is convex in 1 / T, hence has one minimum, which golden-section search finds. Labels that are all alike
    say nothing about the scale and give 1.

    Args:
        logits: [answers].
        labels: [answers], 1 or 0; NaN where not known.
    """
    known = ~labels.isnan()
    logits, labels = logits[known].double(), labels[known].double()
    if not 0 < labels.sum() < len(labels):
        return 1.0

    true = labels.sum().item()
    targets = torch.where(labels == 1, (true + 1) / (true + 2), 1 / (len(labels) - true + 2))

    def loss(log_temperature: float) -> float:
        return binary_cross_entropy_with_logits(logits / exp(log_temperature), targets).item()

    golden = (sqrt(5) - 1) / 2
    low, high = log(_COLDEST), log(_HOTTEST)
    for _ in range(_STEPS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return exp((low + high) / 2)


def reliability(probabilities: Sequence[float], labels: Sequence[bool], bins: int = 10) -> list[dict[str, float]]:
    """The reliability curve: for each bin of equal width that holds answers, the mean probability `p` in it, the
    `share` of true labels, and how many `answers` it has."""
    curve = []
    for number in range(bins):
        inside = [i for i, p in enumerate(probabilities) if min(int(p * bins), bins - 1) == number]
        if inside:
            p, share = (sum(float(values[i]) for i in inside) / len(inside) for values in (probabilities, labels))
            curve.append({"p": p, "share": share, "answers": len(inside)})
    return curve


def calibration_error(probabilities: Sequence[float], labels: Sequence[bool], bins: int = 10) -> float:
    """The expected calibration error: the mean distance of the reliability curve from the diagonal, weighted by the
    bins' answers (Guo et al. 2017, for a binary label)."""
    curve = reliability(probabilities, labels, bins)
    return sum(point["answers"] * abs(point["p"] - point["share"]) for point in curve) / len(probabilities)
