"""Texts of unlike lengths in batches."""

from collections.abc import Iterator, Sequence

import torch


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like lengths, each at most `batch_tokens` with padding, or a single text."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
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
