"""Probes: how well the world's pairs can be judged without reading the preference. They test the data, not a model."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from metaalign_rl.core.dataflow import Row

Features = Callable[[str], dict[str, float]]
STEPS, RATE = 300, 0.5


def length_probe(train: Sequence[Row], held_out: Sequence[Row]) -> float:
    """Pair accuracy on `held_out` of a linear classifier that sees only the number of words of an answer."""
    return _probe(train, held_out, lambda answer: {"words": len(answer.split()) / 10})


def word_probe(train: Sequence[Row], held_out: Sequence[Row]) -> float:
    """Pair accuracy on `held_out` of a linear classifier that sees only which words and marks an answer has."""
    return _probe(train, held_out, lambda answer: dict.fromkeys(re.findall(r"\w+|\W", answer), 1.0))


def _probe(train: Sequence[Row], held_out: Sequence[Row], features: Features) -> float:
    """Logistic regression on the difference of the two answers' features, trained by gradient descent. A tie is 0.5."""
    names: dict[str, int] = {}
    differences = _differences(train, features, names, grow=True)
    weights = np.zeros(len(names))
    for _ in range(STEPS):
        wrong = 1 / (1 + np.exp(differences @ weights))
        weights += RATE * differences.T @ wrong / len(differences)
    margins = _differences(held_out, features, names, grow=False) @ weights
    return float(np.mean(np.where(margins == 0, 0.5, margins > 0)))


def _differences(rows: Sequence[Row], features: Features, names: dict[str, int], *, grow: bool) -> np.ndarray:
    """[pairs, features]: the chosen answer's features minus the rejected one's.

    Args:
        names: column by feature. With `grow`, new features are added; otherwise they are ignored.
    """
    entries = []
    for line, row in enumerate(rows):
        for sign, answer in ((1.0, row.chosen), (-1.0, row.rejected)):
            assert answer is not None
            for name, value in features(answer).items():
                column = names.setdefault(name, len(names)) if grow else names.get(name)
                if column is not None:
                    entries.append((line, column, sign * value))
    table = np.zeros((len(rows), len(names)))
    for line, column, value in entries:
        table[line, column] += value
    return table
