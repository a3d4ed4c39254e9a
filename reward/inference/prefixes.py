"""Groups of texts with a common prefix, so that the prefix is computed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

MIN_SAVED = 0.2  # share of a group's tokens that a group must save; a smaller saving is not worth its masks
MAX_TEXTS = 64  # texts per group; the prefix of more texts is computed once per group


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Texts with the same first `shared` tokens.

    Attributes:
        shared: length of the common prefix, in tokens.
        members: indices of the texts.
    """

    shared: int
    members: list[int]


def group_by_prefix(texts: Sequence[list[int]]) -> Iterator[PrefixGroup]:
    """Group the texts so that as few tokens as possible are left to compute.

    The groups are runs of the sorted texts. A text that would save too little is a group of its own with `shared` 0.
    """
    order = sorted(range(len(texts)), key=texts.__getitem__)
    overlaps = [_shared_length(texts[one], texts[other]) for one, other in pairwise(order)]
    for start, end in _best_runs(overlaps):
        members = order[start:end]
        shared = min(overlaps[start : end - 1], default=0)
        if shared * (len(members) - 1) >= MIN_SAVED * sum(len(texts[index]) for index in members) > 0:
            yield PrefixGroup(shared, members)
        else:
            yield from (PrefixGroup(0, [index]) for index in members)


def _best_runs(overlaps: Sequence[int]) -> list[tuple[int, int]]:
    """Starts and ends of the runs that save the most tokens in total, at most `MAX_TEXTS` texts each.

    Args:
        overlaps: tokens that each sorted text shares with the next one. A run of n texts saves n - 1 times the smallest
            overlap inside it.
    """
    # Dynamic programming. By number of texts: the most tokens saved, and the start of the last run.
    saved, starts = [0], [0]
    for end in range(1, len(overlaps) + 2):
        most, best, shared = saved[end - 1], end - 1, 0
        for start in range(end - 2, max(end - MAX_TEXTS, 0) - 1, -1):
            shared = overlaps[start] if start == end - 2 else min(shared, overlaps[start])
            if not shared:
                break
            if saved[start] + (end - start - 1) * shared > most:
                most, best = saved[start] + (end - start - 1) * shared, start
        saved.append(most)
        starts.append(best)
    runs, end = [], len(overlaps) + 1
    while end:
        runs.append((starts[end], end))
        end = starts[end]
    return runs[::-1]


def _shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix, in tokens; both texts keep at least their last token."""
    limit = min(len(one), len(other)) - 1
    return next((index for index in range(limit) if one[index] != other[index]), limit)
