"""Texts of unlike lengths in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ENOUGH = 1024  # tokens that keep a CPU's cores busy; a batch with as many need not take in much shorter texts
SHORTER = 0.85  # of the longest text's tokens: what is shorter would be padding for the most part


def batches_by_length(lengths: Sequence[int], batch_tokens: int, enough: int = ENOUGH) -> Iterator[list[int]]:
    """Indices in batches of like lengths, each at most `batch_tokens` with padding, or a single text.

    One of `enough` tokens takes in no text that would be padding for the most part.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch:
            longest = lengths[batch[0]]
            full = (len(batch) + 1) * longest > batch_tokens
            unlike = len(batch) * longest >= enough and lengths[index] < SHORTER * longest
            if full or unlike:
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(texts: Sequence[list[int]], pad_token: int) -> dict[str, torch.Tensor]:
    """Token ids padded on the right, and the mask: `input_ids` and `attention_mask`, both [texts, tokens]."""
    width = max(len(text) for text in texts)
    ids = torch.tensor([text + [pad_token] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True, slots=True)
class Line:
    """Texts that begin alike, written once: what they share, and each one's own rest (at least a token)."""

    shared: list[int]
    tails: Sequence[list[int]]

    def __len__(self) -> int:
        return len(self.shared) + sum(map(len, self.tails))


@dataclass(slots=True)
class Lines:
    """A batch of lines, for one pass of a decoder.

    A text's tokens have the positions that they have in the text, and look at what it shares and at itself alone, so
    a decoder computes what it would for the texts one by one.

    Attributes:
        input_ids, position_ids: [lines, tokens].
        attention_mask: [lines, 1, tokens, tokens], True where a token may look; None where causal attention does.
        spans: by text, the line and where its tail begins and ends in it.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    spans: list[tuple[int, int, int]] = field(default_factory=list)


def lay_out(lines: Sequence[Line], pad_token: int) -> Lines:
    """Write the lines into tensors, padded on the right."""
    width = max(map(len, lines))
    ids, positions, branches = (torch.full((len(lines), width), fill) for fill in (pad_token, 0, -1))
    spans = []
    for row, line in enumerate(lines):
        end = len(line.shared)
        ids[row, :end] = torch.tensor(line.shared)
        positions[row, :end] = torch.arange(end)
        branches[row, :end] = 0
        for branch, tail in enumerate(line.tails, start=1):
            start, end = end, end + len(tail)
            ids[row, start:end] = torch.tensor(tail)
            positions[row, start:end] = torch.arange(len(line.shared), len(line.shared) + len(tail))
            branches[row, start:end] = branch
            spans.append((row, start, end))
    if all(len(line.tails) == 1 for line in lines):
        return Lines(ids, positions, None, spans)
    seen, looking = branches[:, None, :], branches[:, :, None]
    mask = ((seen == 0) | (seen == looking)).tril()
    return Lines(ids, positions, mask[:, None], spans)
