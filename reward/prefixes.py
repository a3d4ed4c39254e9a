"""Texts that begin alike, so that what they share is computed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LEAST_SAVED = 0.2  # share of a group's tokens; two passes instead of one cost more than less would save


@dataclass(frozen=True, slots=True)
class Group:
    """Texts that share their first `shared` tokens.

    Attributes:
        members: the texts' indices.
    """

    shared: int
    members: list[int]


def group_by_prefix(texts: Sequence[list[int]]) -> Iterator[Group]:
    """All texts in groups; one that shares too little is a group of its own, which shares nothing.

    A text joins the group of its neighbour in sorted order where that leaves fewer tokens to compute.
    """
    group = Group(0, [])
    for index in sorted(range(len(texts)), key=texts.__getitem__):
        text = texts[index]
        if group.members:
            shared = _common(texts[group.members[0]], text, group.shared or len(texts[group.members[0]]))
            size = len(group.members)
            if size * shared > (size - 1) * group.shared and shared > 0:
                group = Group(shared, [*group.members, index])
                continue
            yield from _worth_it(group, texts)
        group = Group(0, [index])
    if group.members:
        yield from _worth_it(group, texts)


def _common(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    """How many first tokens two texts share, at most `limit`, so that each keeps one of its own."""
    limit = min(limit, len(one) - 1, len(other) - 1)
    return next((place for place in range(limit) if one[place] != other[place]), max(limit, 0))


def _worth_it(group: Group, texts: Sequence[list[int]]) -> Iterator[Group]:
    tokens = sum(len(texts[index]) for index in group.members)
    if group.shared * (len(group.members) - 1) >= LEAST_SAVED * tokens:
        yield group
    else:
        yield from (Group(0, [index]) for index in group.members)
