"""A batch of samples as tensors, and how it is dealt out to ranks and micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from metaalign_rl.learner.openrlhf_modules import openrlhf_module
from metaalign_rl.core.batching import Line, batches_by_length, lay_out


@dataclass(slots=True)
class Batch:
    """Prompts with their responses, right-padded. Column t of a [B, T-1] tensor is about token t+1.

    Attributes:
        sequences: [B, T] token ids, prompt then response.
        attention_mask: [B, T], True at tokens that are not padding.
        action_mask: [B, T-1], True where token t+1 belongs to the response.
        rollout_logprobs: [B, T-1] as the rollout engine said them.
        logprobs, ref_logprobs, values: [B, T-1] from `Learner.evaluate`, 0 outside the action mask.
        advantages, returns: [B, T-1], what `Learner.train` fits.
    """

    sequences: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    rollout_logprobs: Tensor | None = None
    logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    @classmethod
    def from_samples(
        cls,
        samples: Sequence[tuple[Sequence[int], Sequence[int]]],
        pad_id: int,
        rollout_logprobs: Sequence[Sequence[float]] | None = None,
    ) -> "Batch":
        """A batch of (prompt ids, response ids), neither empty; the rollout's log-probabilities by token."""
        assert all(prompt and response for prompt, response in samples), "an empty prompt or response"
        prompts = torch.tensor([len(prompt) for prompt, _ in samples])
        lengths = prompts + torch.tensor([len(response) for _, response in samples])
        sequences = torch.full((len(samples), int(lengths.max())), pad_id)
        for row, (prompt, response) in enumerate(samples):
            sequences[row, : lengths[row]] = torch.tensor([*prompt, *response])
        column = torch.arange(sequences.shape[1])
        attention_mask = column < lengths[:, None]
        action_mask = attention_mask[:, 1:] & (column[1:] >= prompts[:, None])
        batch = cls(sequences, attention_mask, action_mask)
        if rollout_logprobs is not None:
            flat = torch.tensor([value for row in rollout_logprobs for value in row], dtype=torch.float32)
            batch.rollout_logprobs = torch.zeros(action_mask.shape).masked_scatter_(action_mask, flat)
        return batch

    def __len__(self) -> int:
        return len(self.sequences)

    def lengths(self) -> list[int]:
        """Tokens of each sample without padding."""
        return self.attention_mask.sum(dim=1).tolist()

    def response_tokens(self) -> int:
        """Response tokens of the whole batch."""
        return int(self.action_mask.sum())

    def select(self, indices: Sequence[int]) -> "Batch":
        """The samples at `indices`, in that order, cut to the longest of them."""
        rows = torch.as_tensor(indices)
        longest = int(self.attention_mask[rows].sum(dim=1).max())
        return Batch(*(_cut(getattr(self, f.name), rows, longest - (f.name not in FULL)) for f in fields(self)))

    @staticmethod
    def concat(batches: Sequence["Batch"]) -> "Batch":
        """All samples of the batches, in order, padded to the longest. What one of them lacks, the whole lacks."""
        longest = max(batch.sequences.shape[1] for batch in batches)
        columns = []
        for f in fields(Batch):
            tensors = [getattr(batch, f.name) for batch in batches]
            width = longest - (f.name not in FULL)
            whole = all(tensor is not None for tensor in tensors)
            columns.append(torch.cat([_widen(tensor, width) for tensor in tensors]) if whole else None)
        return Batch(*columns)

    def by_prompt(self) -> list[list[int]]:
        """The samples in groups that answer the same prompt."""
        groups: dict[bytes, list[int]] = {}
        for index, (ids, length) in enumerate(zip(self.sequences.numpy(), self._prompt_lengths(), strict=True)):
            groups.setdefault(ids[:length].tobytes(), []).append(index)
        return list(groups.values())

    def plan(
        self, rows: Sequence[int], ranks: int, max_tokens: int, enough: int, *, share_prompts: bool
    ) -> list[list["MicroBatch"]]:
        """The samples at `rows` in each rank's micro-batches; see `plan_micro_batches`.

        Answers that share a pass over their prompt go together, up to `max_tokens` of them.
        """
        part, lengths, prompts = self.select(rows), self.lengths(), self._prompt_lengths()
        lines: list[list[int]] = []
        widths: list[int] = []
        for group in part.by_prompt() if share_prompts else [[index] for index in range(len(rows))]:
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

    def inputs(self, *, share_prompts: bool) -> "Inputs":
        """What the models read; answers to the same prompt share one pass over it if wanted."""
        groups = self.by_prompt() if share_prompts else []
        if len(groups) in (0, len(self)):
            return self._inputs_alone()
        prompts, lengths, ids = self._prompt_lengths(), self.lengths(), self.sequences.tolist()
        tails = [ids[index][prompts[index] : lengths[index]] for index in range(len(self))]
        lines = lay_out([Line(ids[g[0]][: prompts[g[0]]], [tails[index] for index in g]) for g in groups], pad_token=0)
        width = lines.input_ids.shape[1]
        sources: list[list[int]] = [[]] * len(self)
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

    def _inputs_alone(self) -> "Inputs":
        positions = torch.arange(self.sequences.shape[1]).expand(self.sequences.shape)
        before = torch.arange(self.sequences.numel()).view_as(self.sequences)[:, :-1][self.action_mask]
        return Inputs(self.sequences, positions, None, before, self.sequences[:, 1:][self.action_mask])

    def _prompt_lengths(self) -> list[int]:
        lengths: list[int] = (self.action_mask.long().argmax(dim=1) + 1).tolist()
        return lengths

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in tensors))


@dataclass(slots=True)
class Inputs:
    """What a model reads to judge a batch's N response tokens, row by row.

    Attributes:
        input_ids, position_ids: [lines, tokens].
        attention_mask: [lines, 1, tokens, tokens] or None; see `metaalign_rl.core.batching.Lines`.
        sources: [N], where the token before each response token stands in the flattened lines.
        tokens: [N], the response tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    sources: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> "Inputs":
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


FULL = ("sequences", "attention_mask")  # [B, T]; the others are [B, T-1]


def _widen(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))


def _cut(tensor: Tensor | None, rows: Tensor, width: int) -> Tensor | None:
    return None if tensor is None else tensor[rows, :width]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of one forward pass. A filler counts for nothing: it keeps a rank in step with the others."""

    indices: list[int]
    filler: bool = False

    def of(self, lines: Sequence[Sequence[int]]) -> "MicroBatch":
        """The samples of the lines that `indices` name."""
        return MicroBatch([row for index in self.indices for row in lines[index]], self.filler)


def plan_micro_batches(
    lengths: Sequence[int], indices: Sequence[int], ranks: int, max_tokens: int, enough: int
) -> list[list[MicroBatch]]:
    """Deal the samples at `indices` out to ranks, balanced by tokens, by at most `max_tokens`.

    Every rank gets the same number of micro-batches, since ranks meet in collective operations: fillers where there are
    fewer samples than ranks. A sample
    longer than `max_tokens` goes alone; a micro-batch of `enough` tokens takes in none that would be padding for the
    most part. The plan depends on its arguments alone, so all ranks come to the same one.
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


def _by_length(lengths: Sequence[int], indices: Sequence[int], max_tokens: int, enough: int) -> list[list[int]]:
    batches = batches_by_length([lengths[index] for index in indices], max_tokens, enough)
    return [[indices[place] for place in batch] for batch in batches]


def _stretch(plan: list[list[int]], rounds: int) -> list[MicroBatch]:
    missing = rounds - len(plan)
    return [MicroBatch(indices) for indices in plan] + [MicroBatch(plan[-1][-1:], filler=True)] * missing
