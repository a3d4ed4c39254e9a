"""Build batches from samples and join them. `metaalign_rl.core.dataflow.Batch` is the type."""

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn import functional

from metaalign_rl.core.dataflow import Batch, Sample


def make_batch(
    responses: Sequence[tuple[Sequence[int], Sequence[int]]],
    pad_id: int,
    rollout_logprobs: Sequence[Sequence[float]] | None = None,
) -> Batch:
    """Pad prompts and responses into one batch.

    Args:
        responses: (prompt ids, response ids) each, neither empty.
        rollout_logprobs: the rollout engine's log-probability of each response token.
    """
    assert all(prompt and response for prompt, response in responses), "an empty prompt or response"
    prompts = torch.tensor([len(prompt) for prompt, _ in responses])
    lengths = prompts + torch.tensor([len(response) for _, response in responses])
    sequences = torch.full((len(responses), int(lengths.max())), pad_id)
    for row, (prompt, response) in enumerate(responses):
        sequences[row, : lengths[row]] = torch.tensor([*prompt, *response])
    column = torch.arange(sequences.shape[1])
    attention_mask = column < lengths[:, None]
    action_mask = attention_mask[:, 1:] & (column[1:] >= prompts[:, None])
    batch = Batch(sequences, attention_mask, action_mask)
    if rollout_logprobs is not None:
        flat = torch.tensor([value for row in rollout_logprobs for value in row], dtype=torch.float32)
        batch.rollout_logprobs = torch.zeros(action_mask.shape).masked_scatter_(action_mask, flat)
    return batch


def batch_of(samples: Sequence[Sample], pad_id: int) -> Batch:
    """The samples' tokens and the engine's log-probabilities as one batch."""
    return make_batch(
        [(sample.prompt_ids, sample.response_ids) for sample in samples],
        pad_id,
        [sample.logprobs for sample in samples],
    )


def concat(batches: Sequence[Batch]) -> Batch:
    """All samples of the batches, in order, padded to the longest. A field that one batch lacks is None."""
    longest = max(batch.sequences.shape[1] for batch in batches)

    def join(name: str) -> Tensor | None:
        tensors = [getattr(batch, name) for batch in batches]
        width = Batch.width_of(name, longest)
        return None if any(tensor is None for tensor in tensors) else torch.cat([_widen(t, width) for t in tensors])

    return Batch(**{f.name: join(f.name) for f in fields(Batch)})


def group_by_prompt(batch: Batch) -> list[list[int]]:
    """The samples' indices in groups that answer the same prompt."""
    groups: dict[bytes, list[int]] = {}
    for index, (ids, length) in enumerate(zip(batch.sequences.numpy(), batch.prompt_lengths(), strict=True)):
        groups.setdefault(ids[:length].tobytes(), []).append(index)
    return list(groups.values())


def _widen(tensor: Tensor, width: int) -> Tensor:
    return functional.pad(tensor, (0, width - tensor.shape[1]))
