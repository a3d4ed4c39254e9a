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


@dataclass(frozen=True, slots=True)
class SharedBatch:
    """Groups that are scored together: their prefixes in one pass, then what follows in every text in another."""

    groups: list[Group]

    @property
    def members(self) -> list[int]:
        """The texts' indices, group by group."""
        return [index for group in self.groups for index in group.members]

    @property
    def owners(self) -> list[int]:
        """For each member the number of its group."""
        return [number for number, group in enumerate(self.groups) for _ in group.members]


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


def shared_batches(groups: Sequence[Group], texts: Sequence[list[int]], batch_tokens: int) -> Iterator[SharedBatch]:
    """Groups with like prefixes in batches of at most `batch_tokens` with padding; a larger group in several."""
    batch: list[Group] = []
    for group in sorted(
        (part for group in groups for part in _split(group, texts, batch_tokens)), key=lambda group: -group.shared
    ):
        if batch and _tokens([*batch, group], texts) > batch_tokens:
            yield SharedBatch(batch)
            batch = []
        batch.append(group)
    if batch:
        yield SharedBatch(batch)


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


def _split(group: Group, texts: Sequence[list[int]], batch_tokens: int) -> Iterator[Group]:
    longest = max(len(texts[index]) for index in group.members) - group.shared
    count = max(1, (batch_tokens - group.shared) // longest)
    members = sorted(group.members, key=lambda index: len(texts[index]))
    yield from (Group(group.shared, members[start : start + count]) for start in range(0, len(members), count))


def _tokens(groups: Sequence[Group], texts: Sequence[list[int]]) -> int:
    """What the two passes compute, padding included."""
    tails = [len(texts[index]) - group.shared for group in groups for index in group.members]
    return len(groups) * max(group.shared for group in groups) + len(tails) * max(tails)
