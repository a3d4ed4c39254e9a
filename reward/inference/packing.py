"""Packs: many texts in one sequence of tokens, without padding and with each shared prefix only once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from reward.inference.prefixes import PrefixGroup

# Suffix tokens that attend in one block. Larger blocks mean fewer attention calls, but more scores that the mask hides.
BLOCK_TOKENS = 128


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """Tokens of a pack and the tokens that they attend to.

    Attributes:
        queries: positions of the attending tokens: a slice or a list.
        keys: positions of the tokens that they attend to, as consecutive slices.
        mask: [queries, keys], 0 where a token attends and -inf where it does not. None: it attends to all keys, or with
            `causal` to all keys up to itself.
        causal: see `mask`.
    """

    queries: slice | list[int]
    keys: tuple[slice, ...]
    mask: Tensor | None = None
    causal: bool = False


@dataclass(slots=True)
class Pack:
    """Texts for one forward pass of a decoder.

    Each token has the position that it has in its text, and attends only to that text's earlier tokens. So a decoder
    computes the same as for each text alone.

    Attributes:
        texts: indices of the texts.
        tokens, positions: token ids and their positions in their texts, for the pack's single sequence.
        last: for each text, the index of its last token in `tokens`.
        attentions: all attention of the pack.
        last_attentions: the attention of the last tokens only; the model's last layer needs no more.
    """

    texts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    attentions: list[AttentionBlock] = field(default_factory=list)
    last_attentions: list[AttentionBlock] = field(default_factory=list)

    def add(self, group: PrefixGroup, texts: Sequence[list[int]]) -> None:
        """Append a group's texts, with their shared prefix once."""
        self.texts += group.members
        if group.shared:
            prefix = self._append(texts[group.members[0]][: group.shared], 0)
            self.attentions.append(AttentionBlock(prefix, (prefix,), causal=True))
            for suffixes in _in_blocks([texts[index][group.shared :] for index in group.members]):
                self._add_suffixes(prefix, suffixes)
        else:
            for index in group.members:
                text = self._append(texts[index], 0)
                self.last.append(text.stop - 1)
                self.attentions.append(AttentionBlock(text, (text,), causal=True))
                self.last_attentions.append(AttentionBlock([text.stop - 1], (text,)))

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the masks to the model's device and type, once for all layers."""

        def moved(block: AttentionBlock) -> AttentionBlock:
            return block if block.mask is None else replace(block, mask=block.mask.to(device, dtype))

        self.attentions = [moved(block) for block in self.attentions]
        self.last_attentions = [moved(block) for block in self.last_attentions]

    def _add_suffixes(self, prefix: slice, suffixes: Sequence[list[int]]) -> None:
        """Append what follows the shared prefix in some texts."""
        shared = prefix.stop - prefix.start
        spans = [self._append(suffix, shared) for suffix in suffixes]
        queries = slice(spans[0].start, spans[-1].stop)
        last = [span.stop - 1 for span in spans]
        mask = _suffix_mask(shared, [len(suffix) for suffix in suffixes])
        self.last += last
        self.attentions.append(AttentionBlock(queries, (prefix, queries), mask))
        last_rows = [index - queries.start for index in last]
        self.last_attentions.append(AttentionBlock(last, (prefix, queries), mask[last_rows]))

    def _append(self, tokens: list[int], position: int) -> slice:
        """Append tokens and return their slice of the pack. `position`: position of the first token in its text."""
        start = len(self.tokens)
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        return slice(start, len(self.tokens))


def pack_texts(groups: Iterable[PrefixGroup], texts: Sequence[list[int]], max_tokens: int) -> Iterator[Pack]:
    """Pack all groups. A pack has at most `max_tokens` tokens, or a single text. A group may span several packs."""
    pack = Pack()
    for group in groups:
        for part in _split(group, texts, max_tokens):
            if pack.texts and len(pack.tokens) + packed_tokens(part, texts) > max_tokens:
                yield pack
                pack = Pack()
            pack.add(part, texts)
    if pack.texts:
        yield pack


def packed_tokens(group: PrefixGroup, texts: Sequence[list[int]]) -> int:
    """Tokens of a group, its shared prefix counted once."""
    return group.shared + sum(len(texts[index]) - group.shared for index in group.members)


def _split(group: PrefixGroup, texts: Sequence[list[int]], max_tokens: int) -> Iterator[PrefixGroup]:
    part = PrefixGroup(group.shared, [])
    for index in group.members:
        longer = PrefixGroup(group.shared, [*part.members, index])
        if part.members and packed_tokens(longer, texts) > max_tokens:
            yield part
            longer = PrefixGroup(group.shared, [index])
        part = longer
    yield part


def _in_blocks(suffixes: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Split the suffixes into lists of at most `BLOCK_TOKENS` tokens, or a single suffix."""
    block: list[list[int]] = []
    for suffix in suffixes:
        if block and sum(map(len, block)) + len(suffix) > BLOCK_TOKENS:
            yield block
            block = []
        block.append(suffix)
    yield block


def _suffix_mask(shared: int, lengths: Sequence[int]) -> Tensor:
    """The attention mask of suffixes after one prefix, [suffix tokens, prefix and suffix tokens].

    Each token attends to the prefix and to its own suffix up to itself.
    """
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    own = (owner[:, None] == owner).tril()
    attends = torch.cat([torch.ones(len(owner), shared, dtype=torch.bool), own], dim=1)
    return torch.zeros(attends.shape).masked_fill(~attends, -torch.inf)
