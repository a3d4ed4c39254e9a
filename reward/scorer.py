"""Scoring answers with a trained reward model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metaalign_rl.core.batching import batches_by_length, pad
from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import encode_row
from reward import model as checkpoints
from reward.examples import answer_row
from reward.inference.decoder import pack_logits, reads_packs
from reward.inference.packing import pack_texts
from reward.inference.prefixes import group_by_prefix
from reward.inference.streamline import streamline
from reward.inference.windows import ahead, windows
from reward.score import Score, make_score

BATCH_TOKENS = 16_384
WINDOW = 512  # rows that are sorted into batches together
CPU_PASS = 4096  # tokens of a pass on a CPU times bytes of a number: more would not stay in a core's cache

AnyRow = Row | Mapping[str, Any]


class Scorer:
    """A reward model with its tokenizer, ready to score.

    Attributes:
        max_tokens: the longest text; of a longer one the dialog loses its left end, never a tier or the
            response.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None):
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
        longest = min(positions, tokenizer.model_max_length)
        if max_tokens is not None and not 0 < max_tokens <= longest:
            raise UserError(f"max_tokens: expected 1 to {longest}, the model's context, found {max_tokens}")
        self.model = model
        self.tokenizer = tokenizer
        self._turn = Lock()  # a pass changes how the model attends
        self.max_tokens = max_tokens or longest

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
            path: a folder that `train` wrote, or such a model's id on the Hugging Face hub.
            device: where it runs; without it the machine's accelerator, else the CPU.
            dtype: the weights' type, such as `"float32"`; without it `default_dtype`'s.
            max_tokens: the longest text; without it the model's context.

        Raises:
            UserError: nothing there, or not a reward model that this release can read safely.
        """
        device = torch.device(device) if device else default_device()
        model, tokenizer = checkpoints.load(path, device, dtype or default_dtype(device))
        streamline(model)
        return cls(model, tokenizer, max_tokens)

    def score(
        self, rows: Iterable[AnyRow], places: Iterable[str] | None = None, *, batch_tokens: int = BATCH_TOKENS
    ) -> list[Score]:
        """Score each row's `response`; the scores come in the rows' order.

        Args:
            rows: `Row` objects, or mappings with `messages`, `response` and, if they say something,
                `system_info` and `user_info` (a row's other fields are allowed).
            places: what errors call each row; without them `rows[0]` and so on.
            batch_tokens: tokens a forward pass at most; on a CPU a decoder's passes are shorter. It changes speed and
                memory, not scores.

        Raises:
            UserError: a bad row, or one whose tiers and response do not fit the context; names its place and
                field.
        """
        return list(self.stream(rows, places, batch_tokens=batch_tokens))

    def stream(
        self, rows: Iterable[AnyRow], places: Iterable[str] | None = None, *, batch_tokens: int = BATCH_TOKENS
    ) -> Iterator[Score]:
        """As `score`, one after the other: of any number of rows a few windows are in memory at a time.

        While a window is scored, the next one is tokenised.
        """

        def encode(window: Sequence[tuple[AnyRow, str]]) -> list[list[int]]:
            return [self.encode(row, place) for row, place in window]

        for texts in ahead(encode, windows(named(rows, places), WINDOW)):
            yield from self.score_tokens(texts, batch_tokens=batch_tokens)

    def encode(self, row: AnyRow, place: str) -> list[int]:
        """The token ids that the model reads for one row; errors name `place`."""
        row = answer_row(row, place)
        return encode_row(self.tokenizer, row, max_tokens=self.max_tokens, response=row.response, place=place)

    def score_tokens(self, texts: Sequence[list[int]], *, batch_tokens: int = BATCH_TOKENS) -> list[Score]:
        """Score texts that `encode` made."""
        return [make_score(logits) for logits in self.logits(texts, batch_tokens=batch_tokens).tolist()]

    @torch.inference_mode()
    def logits(self, texts: Sequence[list[int]], *, batch_tokens: int = BATCH_TOKENS) -> torch.Tensor:
        """The logits of texts that `encode` made, float32 on the CPU, [texts, labels]."""
        if batch_tokens < 1:
            raise UserError(f"batch_tokens: expected 1 or more, found {batch_tokens}")
        logits = torch.empty(len(texts), len(LABELS))
        with self._turn:
            for members, found in self._passes(texts, batch_tokens):
                logits[members] = found.float().cpu()
        if not logits.isfinite().all():
            raise UserError(
                f"{self.model.config.name_or_path}: the model's scores are not finite in {self.model.dtype}; "
                "the checkpoint is broken or needs a wider dtype"
            )
        return logits

    def _passes(self, texts: Sequence[list[int]], batch_tokens: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Some texts' indices and their logits, until all are done."""
        if self._reads_packs:
            cached = CPU_PASS // self.model.dtype.itemsize if self.model.device.type == "cpu" else batch_tokens
            for pack in pack_texts(group_by_prefix(texts), texts, min(batch_tokens, cached)):
                yield pack.texts, pack_logits(self.model, pack)
        else:
            for batch in batches_by_length([len(text) for text in texts], batch_tokens):
                inputs = pad([texts[index] for index in batch], self.model.config.get_text_config().pad_token_id)
                inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
                yield batch, self.model(**inputs).logits

    @cached_property
    def _reads_packs(self) -> bool:
        return reads_packs(self.model)


def named(rows: Iterable[AnyRow], places: Iterable[str] | None) -> Iterator[tuple[AnyRow, str]]:
    """Each row with what errors call it."""
    if places is not None:
        return zip(rows, places, strict=True)
    return ((row, f"rows[{index}]") for index, row in enumerate(rows))


def default_device() -> torch.device:
    """The machine's accelerator, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the hardware multiplies matrices in it several times faster, else None: the checkpoint's own type.

    A logit then has about three significant digits, and may differ with the texts that are scored beside it.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return torch.bfloat16 if fast else None
