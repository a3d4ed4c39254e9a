"""Batches of texts of different lengths: grouping by length, padding, and writing a shared prefix once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ENOUGH = 1024  # tokens that keep a CPU's cores busy; a batch with as many needs no much shorter texts
SHORTER = 0.85  # share of a batch's longest text; a batch with enough tokens takes no shorter text


def batches_by_length(lengths: Sequence[int], batch_tokens: int, enough: int = ENOUGH) -> Iterator[list[int]]:
    """Group texts of similar lengths; yields lists of indices, the longest texts first.

    Args:
        lengths: tokens of each text.
        batch_tokens: most tokens of a batch, padding included. A longer text is a batch of its own.
        enough: a batch with this many tokens takes no text that is shorter than `SHORTER` of its longest.
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
    """Token ids, padded on the right, and their mask: `input_ids` and `attention_mask`, both [texts, tokens]."""
    width = max(len(text) for text in texts)
    ids = torch.tensor([text + [pad_token] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True, slots=True)
class Line:
    """Texts with a common prefix, which is written once.

    Attributes:
        shared: tokens of the prefix.
        tails: each text's tokens after the prefix, at least one.
    """

    shared: list[int]
    tails: Sequence[list[int]]

    def __len__(self) -> int:
        return len(self.shared) + sum(map(len, self.tails))


@dataclass(slots=True)
class Lines:
    """A batch of lines for one forward pass of a decoder.

    Each token has the position that it has in its text, and attends only to the prefix and to its own text. So a
    decoder computes what it computes for separate texts.

    Attributes:
        input_ids, position_ids: [lines, tokens], padded on the right.
        attention_mask: [lines, 1, tokens, tokens], True where a token attends; None if causal attention is the same.
        spans: for each text its line, and the start and end of its tail in the line.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    spans: list[tuple[int, int, int]] = field(default_factory=list)


def lay_out(lines: Sequence[Line], pad_token: int) -> Lines:
    """The lines as tensors, padded on the right."""
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
    keys, queries = branches[:, None, :], branches[:, :, None]
    mask = ((keys == 0) | (keys == queries)).tril()
    return Lines(ids, positions, mask[:, None], spans)
