"""Texts that begin alike, so that what they share is computed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

LEAST_SAVED = 0.2  # share of a group's tokens; below it, texts as they are need no masks
LARGEST = 64  # texts of a group; a beginning that more of them share is computed once for each group


@dataclass(frozen=True, slots=True)
class Group:
    """Texts that share their first `shared` tokens.

    Attributes:
        members: the texts' indices.
    """

    shared: int
    members: list[int]


def group_by_prefix(texts: Sequence[list[int]]) -> Iterator[Group]:
    """All texts in groups of neighbours in sorted order, such that the fewest tokens are left to compute.

    A text that shares too little is a group of its own, which shares nothing.
    """
    order = sorted(range(len(texts)), key=texts.__getitem__)
    alike = [_common(texts[one], texts[other]) for one, other in pairwise(order)]
    for start, end in _runs(alike):
        members = order[start:end]
        shared = min(alike[start : end - 1], default=0)
        if shared * (len(members) - 1) >= LEAST_SAVED * sum(len(texts[index]) for index in members) > 0:
            yield Group(shared, members)
        else:
            yield from (Group(0, [index]) for index in members)


def _runs(alike: Sequence[int]) -> list[tuple[int, int]]:
    """Where runs of texts start and end, of at most `LARGEST`, so that what they save is greatest in all.

    `alike` says how much each text shares with the next one; a run of n saves n - 1 times the least of its own.
    """
    saved, starts = [0], [0]  # of the first texts: the most that they save, and where their last run starts
    for end in range(1, len(alike) + 2):
        most, best, shared = saved[end - 1], end - 1, 0
        for start in range(end - 2, max(end - LARGEST, 0) - 1, -1):
            shared = alike[start] if start == end - 2 else min(shared, alike[start])
            if not shared:
                break
            if saved[start] + (end - start - 1) * shared > most:
                most, best = saved[start] + (end - start - 1) * shared, start
        saved.append(most)
        starts.append(best)
    runs, end = [], len(alike) + 1
    while end:
        runs.append((starts[end], end))
        end = starts[end]
    return runs[::-1]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two texts share, so that each keeps one of its own."""
    limit = min(len(one), len(other)) - 1
    return next((place for place in range(limit) if one[place] != other[place]), limit)
