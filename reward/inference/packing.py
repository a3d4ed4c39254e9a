"""Many texts in one row of tokens: no padding, and what texts share at their beginning stands in it once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from reward.inference.prefixes import Group

NEAR = 128  # tokens of ends that attend together: fewer calls, but a call also computes what its mask then hides


@dataclass(frozen=True, slots=True)
class Attention:
    """Tokens of a pack, and those that they attend to.

    Attributes:
        queries: where the tokens stand: a slice, or their indices.
        keys: where what they look at stands, one slice after the other.
        mask: [queries, keys], 0 where a token looks and -inf where not; None where it looks at all of them, or at those
            up to itself if `causal`.
    """

    queries: slice | list[int]
    keys: tuple[slice, ...]
    mask: Tensor | None = None
    causal: bool = False


@dataclass(slots=True)
class Pack:
    """Texts for one pass of a decoder.

    A token has the position that it has in its text and attends to that text's earlier tokens alone, so a decoder
    computes what it would for the texts one by one.

    Attributes:
        texts: the texts' indices.
        tokens, positions: of the whole row.
        last: where each text's last token stands.
        attentions: all that is attended to.
        last_attentions: the part of it that the last tokens need, which is all that a model's last layer must compute.
    """

    texts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    last_attentions: list[Attention] = field(default_factory=list)

    def add(self, group: Group, texts: Sequence[list[int]]) -> None:
        """Append a group's texts; what they share comes once."""
        self.texts += group.members
        if group.shared:
            shared = self._append(texts[group.members[0]][: group.shared], 0)
            self.attentions.append(Attention(shared, (shared,), causal=True))
            for near in _near([texts[index][group.shared :] for index in group.members]):
                self._add_ends(shared, near)
        else:
            for index in group.members:
                whole = self._append(texts[index], 0)
                self.last.append(whole.stop - 1)
                self.attentions.append(Attention(whole, (whole,), causal=True))
                self.last_attentions.append(Attention([whole.stop - 1], (whole,)))

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the masks to where they are added to scores, once for all layers."""

        def moved(part: Attention) -> Attention:
            return part if part.mask is None else replace(part, mask=part.mask.to(device, dtype))

        self.attentions = [moved(part) for part in self.attentions]
        self.last_attentions = [moved(part) for part in self.last_attentions]

    def _add_ends(self, shared: slice, ends: Sequence[list[int]]) -> None:
        """Append what follows the shared beginning in some texts."""
        places = [self._append(end, shared.stop - shared.start) for end in ends]
        queries = slice(places[0].start, places[-1].stop)
        last = [place.stop - 1 for place in places]
        mask = _branches(shared.stop - shared.start, [len(end) for end in ends])
        self.last += last
        self.attentions.append(Attention(queries, (shared, queries), mask))
        rows = [place - queries.start for place in last]
        self.last_attentions.append(Attention(last, (shared, queries), mask[rows]))

    def _append(self, tokens: list[int], position: int) -> slice:
        start = len(self.tokens)
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        return slice(start, len(self.tokens))


def pack_texts(groups: Iterable[Group], texts: Sequence[list[int]], most: int) -> Iterator[Pack]:
    """All groups in packs of at most `most` tokens, or a single text; a group may be spread over several packs."""
    pack = Pack()
    for group in groups:
        for part in _split(group, texts, most):
            if pack.texts and len(pack.tokens) + size(part, texts) > most:
                yield pack
                pack = Pack()
            pack.add(part, texts)
    if pack.texts:
        yield pack


def size(group: Group, texts: Sequence[list[int]]) -> int:
    """A group's tokens, the shared ones counted once."""
    return group.shared + sum(len(texts[index]) - group.shared for index in group.members)


def _split(group: Group, texts: Sequence[list[int]], most: int) -> Iterator[Group]:
    part = Group(group.shared, [])
    for index in group.members:
        longer = Group(group.shared, [*part.members, index])
        if part.members and size(longer, texts) > most:
            yield part
            longer = Group(group.shared, [index])
        part = longer
    yield part


def _near(ends: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    near: list[list[int]] = []
    for end in ends:
        if near and sum(map(len, near)) + len(end) > NEAR:
            yield near
            near = []
        near.append(end)
    yield near


def _branches(shared: int, lengths: Sequence[int]) -> Tensor:
    """The mask of ends that all follow one beginning: each looks at that and at itself, up to the token at hand."""
    branch = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    own = (branch[:, None] == branch).tril()
    looks = torch.cat([torch.ones(len(branch), shared, dtype=torch.bool), own], dim=1)
    return torch.zeros(looks.shape).masked_fill(~looks, -torch.inf)
