"""Samples for a model of a few tokens."""

import random

VOCABULARY = 50


def make_samples(count: int = 12) -> list[tuple[list[int], list[int]]]:
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(draw.randint(low, high))]

    return [(ids(2, 9), ids(1, 6)) for _ in range(count)]
