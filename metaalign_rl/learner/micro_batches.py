"""Split a minibatch over ranks and micro-batches, and build a model's inputs for one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from metaalign_rl.core.batching import Line, batches_by_length, lay_out
from metaalign_rl.core.dataflow import Batch
from metaalign_rl.learner.batch import group_by_prompt
from metaalign_rl.learner.openrlhf_modules import openrlhf_module


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of one forward pass. A filler does not count: it keeps a rank in step with the others."""

    indices: list[int]
    filler: bool = False

    def of(self, lines: Sequence[Sequence[int]]) -> MicroBatch:
        """The samples of the lines that `indices` name."""
        return MicroBatch([row for index in self.indices for row in lines[index]], self.filler)


@dataclass(slots=True)
class Inputs:
    """A model's inputs to evaluate a batch's N response tokens, row by row.

    Attributes:
        input_ids, position_ids: [lines, tokens].
        attention_mask: [lines, 1, tokens, tokens] or None; see `metaalign_rl.core.batching.Lines`.
        sources: [N], position in the flattened lines of the token before each response token.
        tokens: [N], the response tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    sources: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> Inputs:
        """The same inputs on another device."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return Inputs(*(None if tensor is None else tensor.to(device) for tensor in tensors))

    def run(self, model: Any) -> Any:
        """The model's outputs for the lines."""
        return model(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            use_cache=False,
        )


def model_inputs(batch: Batch, *, share_prompts: bool) -> Inputs:
    """A model's inputs. With `share_prompts`, responses to the same prompt share one pass over it."""
    groups = group_by_prompt(batch) if share_prompts else []
    if len(groups) in (0, len(batch)):
        return _padded_inputs(batch)
    prompts, lengths, ids = batch.prompt_lengths(), batch.lengths(), batch.sequences.tolist()
    tails = [ids[index][prompts[index] : lengths[index]] for index in range(len(batch))]
    lines = lay_out([Line(ids[g[0]][: prompts[g[0]]], [tails[index] for index in g]) for g in groups], pad_token=0)
    width = lines.input_ids.shape[1]
    sources: list[list[int]] = [[]] * len(batch)
    for index, (row, start, end) in zip((index for group in groups for index in group), lines.spans, strict=True):
        before = [prompts[index] - 1, *range(start, end - 1)]  # the token before each of the response's
        sources[index] = [row * width + position for position in before]
    return Inputs(
        lines.input_ids,
        lines.position_ids,
        lines.attention_mask,
        torch.tensor([source for row in sources for source in row]),
        torch.tensor([token for tail in tails for token in tail]),
    )


def plan_batch(
    batch: Batch, rows: Sequence[int], ranks: int, max_tokens: int, enough: int, *, share_prompts: bool
) -> list[list[MicroBatch]]:
    """The micro-batches of each rank for the samples at `rows`; see `plan_micro_batches`.

    With `share_prompts`, responses to one prompt stay together, up to `max_tokens` tokens.
    """
    part, lengths, prompts = batch.select(rows), batch.lengths(), batch.prompt_lengths()
    lines: list[list[int]] = []
    widths: list[int] = []
    for group in group_by_prompt(part) if share_prompts else [[index] for index in range(len(rows))]:
        for position, row in enumerate(rows[index] for index in group):
            answer = lengths[row] - prompts[row]
            if position == 0 or widths[-1] + answer > max_tokens:
                lines.append([])
                widths.append(prompts[row])
            lines[-1].append(row)
            widths[-1] += answer
    if len(lines) < ranks:
        return plan_micro_batches(lengths, rows, ranks, max_tokens, enough)
    plan = plan_micro_batches(widths, range(len(lines)), ranks, max_tokens, enough)
    return [[micro.of(lines) for micro in share] for share in plan]


def plan_micro_batches(
    lengths: Sequence[int], indices: Sequence[int], ranks: int, max_tokens: int, enough: int
) -> list[list[MicroBatch]]:
    """Split the samples at `indices` over ranks, balanced by tokens, in micro-batches of at most `max_tokens`.

    Every rank gets the same number of micro-batches, because ranks meet in collective operations; fillers make up the
    difference. A sample longer than `max_tokens` is a micro-batch of its own. A micro-batch that has reached `enough`
    tokens accepts no sample that would be mostly padding. The plan depends only on its arguments, so all ranks compute
    the same one.
    """
    if len(indices) < ranks:
        each = [[MicroBatch([index])] for index in indices]
        return each + [[MicroBatch([indices[0]], filler=True)]] * (ranks - len(indices))
    balance = openrlhf_module("utils.seqlen_balancing").get_seqlen_balanced_partitions
    shares = [list(range(len(indices)))]
    if ranks > 1:
        shares = balance([lengths[index] for index in indices], ranks, equal_size=False)
    plans = [_by_length(lengths, [indices[item] for item in share], max_tokens, enough) for share in shares]
    rounds = max(len(plan) for plan in plans)
    return [_stretch(plan, rounds) for plan in plans]


def _padded_inputs(batch: Batch) -> Inputs:
    positions = torch.arange(batch.sequences.shape[1]).expand(batch.sequences.shape)
    before = torch.arange(batch.sequences.numel()).view_as(batch.sequences)[:, :-1][batch.action_mask]
    return Inputs(batch.sequences, positions, None, before, batch.sequences[:, 1:][batch.action_mask])


def _by_length(lengths: Sequence[int], indices: Sequence[int], max_tokens: int, enough: int) -> list[list[int]]:
    batches = batches_by_length([lengths[index] for index in indices], max_tokens, enough)
    return [[indices[place] for place in batch] for batch in batches]


def _stretch(plan: list[list[int]], rounds: int) -> list[MicroBatch]:
    missing = rounds - len(plan)
    return [MicroBatch(indices) for indices in plan] + [MicroBatch(plan[-1][-1:], filler=True)] * missing
