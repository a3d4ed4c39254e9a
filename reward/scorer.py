"""The scorer: scores answers with a trained reward model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metaalign_rl.core.batching import batches_by_length, pad
from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import encode_answer
from reward.answers import answer_row
from reward.checkpoint_record import CheckpointRecord
from reward.inference.exactness import longrope_threshold
from reward.inference.fast_layers import use_fast_layers
from reward.inference.packed_forward import pack_logits, supports_packing
from reward.inference.packing import pack_texts
from reward.inference.prefixes import group_by_prefix
from reward.inference.windows import prefetch, windows
from reward.model import load
from reward.score import Score, make_score

BATCH_TOKENS = 16_384
UNLIMITED = 2**62  # tokens
WINDOW = 512  # rows that are tokenised and sorted into batches together
CPU_PASS_BYTES = 4096  # tokens of a forward pass on a CPU times bytes per number; more does not fit a core's cache

AnyRow = Row | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EncodedText:
    """What the model reads of one row.

    Attributes:
        ids: token ids.
        truncated: the dialog was too long, and its beginning is missing.
    """

    ids: list[int]
    truncated: bool


class Scorer:
    """A reward model with its tokenizer. Threads may share one.

    Args:
        max_tokens: tokens of the longest text. Default: of the longest text in training, or the model's context if the
            checkpoint does not say.

    Attributes:
        max_tokens: a longer text loses the start of its dialog, never a tier or the response.
        untrained: labels that had no training data. Modes that read them are refused.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None):
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
        longest = min(positions, tokenizer.model_max_length)
        if max_tokens is not None and not 0 < max_tokens <= longest:
            raise UserError(f"max_tokens: expected 1 to {longest}, the model's context, found {max_tokens}")
        record = CheckpointRecord.of(model.config)
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens or min(longest, record.max_tokens or longest)
        self.untrained = record.untrained
        self._lock = Lock()  # a forward pass switches the model's attention

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_tokens: int | None = None,
    ) -> "Scorer":
        """Load a reward model.

        Args:
            path: a folder that `train` wrote, or the id of such a model on the Hugging Face hub.
            device: where the model runs. Default: the machine's accelerator, or the CPU if it has none.
            dtype: the type of the weights, such as `"float32"`. Default: see `default_dtype`.
            max_tokens: tokens of the longest text. Default: see `Scorer`.

        Raises:
            UserError: there is no such model, or this release cannot load it safely.
        """
        device = torch.device(device) if device else default_device()
        model, tokenizer = load(path, device, dtype or default_dtype(device))
        use_fast_layers(model)
        return cls(model, tokenizer, max_tokens)

    def score(
        self, rows: Iterable[AnyRow], places: Iterable[str] | None = None, *, batch_tokens: int = BATCH_TOKENS
    ) -> list[Score]:
        """Score each row's `response`.

        Args:
            rows: `Row` objects, or mappings with `messages`, `response` and, for tiers that are not empty,
                `system_info` and `user_info`. A row's other fields are allowed.
            places: the name of each row in errors. Default: `rows[0]`, `rows[1]`, …
            batch_tokens: at most this many tokens per forward pass; on a CPU a decoder's passes are shorter. It changes
                speed and memory, not scores.

        Returns:
            One score per row, in the order of the rows.

        Raises:
            UserError: a row is malformed, or its tiers and response do not fit the model's context. The message names
                the row and the field.
        """
        return list(self.stream(rows, places, batch_tokens=batch_tokens))

    def stream(
        self, rows: Iterable[AnyRow], places: Iterable[str] | None = None, *, batch_tokens: int = BATCH_TOKENS
    ) -> Iterator[Score]:
        """Yield the scores of `score` one by one. Only a few windows of rows are in memory at a time.

        While one window is scored, the next one is tokenised.
        """

        def encode(window: Sequence[tuple[AnyRow, str]]) -> list[EncodedText]:
            return [self.encode_row(row, place) for row, place in window]

        for texts in prefetch(encode, windows(with_places(rows, places), WINDOW)):
            scores = self.score_tokens([text.ids for text in texts], batch_tokens=batch_tokens)
            yield from (replace(score, truncated=text.truncated) for score, text in zip(scores, texts, strict=True))

    def encode(self, row: AnyRow, place: str) -> list[int]:
        """The token ids that the model reads for one row. `place` names the row in errors."""
        return self.encode_row(row, place).ids

    def encode_row(self, row: AnyRow, place: str) -> EncodedText:
        """The token ids that the model reads for one row, and whether they are all of it."""
        row = answer_row(row, place)
        assert row.response is not None
        found = encode_answer(self.tokenizer, row, row.response, max_tokens=self.max_tokens, place=place)
        return EncodedText(found.ids, found.truncated)

    def score_tokens(self, texts: Sequence[list[int]], *, batch_tokens: int = BATCH_TOKENS) -> list[Score]:
        """Score texts that `encode` made."""
        logits = self.logits(texts, batch_tokens=batch_tokens).tolist()
        return [make_score(values, untrained=self.untrained) for values in logits]

    @torch.inference_mode()
    def logits(self, texts: Sequence[list[int]], *, batch_tokens: int = BATCH_TOKENS) -> torch.Tensor:
        """The logits of texts that `encode` made: float32 on the CPU, [texts, labels].

        Raises:
            UserError: `batch_tokens` is below 1, or a logit is not finite.
        """
        if batch_tokens < 1:
            raise UserError(f"batch_tokens: expected 1 or more, found {batch_tokens}")
        logits = torch.empty(len(texts), len(LABELS))
        with self._lock:
            for indices, batch_logits in self._forward(texts, batch_tokens):
                logits[indices] = batch_logits.float().cpu()
        if not logits.isfinite().all():
            raise UserError(
                f"{self.model.config.name_or_path}: the model's scores are not finite in {self.model.dtype}; "
                "the checkpoint is broken or needs a wider dtype"
            )
        return logits

    def _forward(self, texts: Sequence[list[int]], batch_tokens: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Run the model over all texts; per forward pass, the texts' indices and their logits."""
        if self._supports_packing:
            on_cpu = self.model.device.type == "cpu"
            limit = CPU_PASS_BYTES // self.model.dtype.itemsize if on_cpu else batch_tokens
            for pack in pack_texts(group_by_prefix(texts), texts, min(batch_tokens, limit)):
                yield pack.texts, pack_logits(self.model, pack)
        else:
            for batch in self._batches(texts, batch_tokens):
                inputs = pad([texts[index] for index in batch], self.model.config.get_text_config().pad_token_id)
                inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
                yield batch, self.model(**inputs).logits

    def _batches(self, texts: Sequence[list[int]], batch_tokens: int) -> Iterator[list[int]]:
        """Indices of texts that can share a padded batch."""
        threshold = longrope_threshold(self.model.config.get_text_config()) or UNLIMITED
        for is_long in (True, False):
            group = [index for index, text in enumerate(texts) if (len(text) > threshold) is is_long]
            for batch in batches_by_length([len(texts[index]) for index in group], batch_tokens):
                yield [group[index] for index in batch]

    @cached_property
    def _supports_packing(self) -> bool:
        return supports_packing(self.model)


def with_places(rows: Iterable[AnyRow], places: Iterable[str] | None) -> Iterator[tuple[AnyRow, str]]:
    """Each row with its name in errors: from `places`, or `rows[0]`, `rows[1]`, …"""
    if places is not None:
        return zip(rows, places, strict=True)
    return ((row, f"rows[{index}]") for index, row in enumerate(rows))


def default_device() -> torch.device:
    """The machine's accelerator, or the CPU if it has none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 if the device multiplies matrices several times faster in it, else None: the checkpoint's own type.

    In bfloat16 a logit has about three significant digits, and may change with the texts in the same batch.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 has no such function
        fast = device.type == "cpu" and bool(capabilities.get("amx_bf16"))
    return torch.bfloat16 if fast else None
