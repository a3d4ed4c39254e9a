"""Scoring answers with a trained reward model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metaalign_rl.errors import UserError
from metaalign_rl.meta_prompt import MetaPrompt, encode
from metaalign_rl.schema import LABELS, Row
from reward import model as checkpoints
from reward.batches import batches_by_length, pad
from reward.data import answer_row
from reward.prefixes import Group, SharedBatch, group_by_prefix, shared_batches
from reward.score import Score, make_score

BATCH_TOKENS = 16_384


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
        self._is_causal = _is_causal(model)
        self.tokenizer = tokenizer
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
            dtype: the weights' type, such as `"bfloat16"`; without it the checkpoint's own.
            max_tokens: the longest text; without it the model's context.

        Raises:
            UserError: nothing there, or not a reward model that this release can read safely.
        """
        model, tokenizer = checkpoints.load(path, device or default_device(), dtype)
        return cls(model, tokenizer, max_tokens)

    def score(
        self,
        rows: Sequence[Row | Mapping[str, Any]],
        *,
        batch_tokens: int = BATCH_TOKENS,
        place: str = "rows",
    ) -> list[Score]:
        """Score each row's `response`; the scores come in the rows' order.

        Args:
            rows: `Row` objects, or mappings with `messages`, `response` and, if they say something,
                `system_info` and `user_info` (a row's other fields are allowed).
            batch_tokens: tokens a forward pass, padding included; it changes speed and memory, not scores.
            place: what errors call the list.

        Raises:
            UserError: a bad row, or one whose tiers and response do not fit the context; names its index and
                field.
        """
        return self.score_tokens(
            [self.encode(row, f"{place}[{index}]") for index, row in enumerate(rows)],
            batch_tokens=batch_tokens,
        )

    def encode(self, row: Row | Mapping[str, Any], place: str) -> list[int]:
        """The token ids that the model reads for one row; errors name `place`."""
        row = answer_row(row, place)
        meta = MetaPrompt(row.system_info, row.user_info)
        return encode(
            self.tokenizer, meta, row.messages, max_tokens=self.max_tokens, response=row.response, place=place
        )

    def score_tokens(self, texts: Sequence[list[int]], *, batch_tokens: int = BATCH_TOKENS) -> list[Score]:
        """Score texts that `encode` made."""
        return [make_score(logits) for logits in self.logits(texts, batch_tokens=batch_tokens).tolist()]

    @torch.inference_mode()
    def logits(self, texts: Sequence[list[int]], *, batch_tokens: int = BATCH_TOKENS) -> torch.Tensor:
        """The logits of texts that `encode` made, float32 on the CPU, [texts, labels]."""
        if batch_tokens < 1:
            raise UserError(f"batch_tokens: expected 1 or more, found {batch_tokens}")
        logits = torch.empty(len(texts), len(LABELS))
        groups = list(group_by_prefix(texts)) if self._is_causal else [Group(0, [i]) for i in range(len(texts))]
        alone = [group.members[0] for group in groups if not group.shared]
        for places in batches_by_length([len(texts[index]) for index in alone], batch_tokens):
            batch = [alone[place] for place in places]
            logits[batch] = self._plain_pass([texts[index] for index in batch]).float().cpu()
        for shared in shared_batches([group for group in groups if group.shared], texts, batch_tokens):
            logits[shared.members] = self._shared_pass(shared, texts).float().cpu()
        if not logits.isfinite().all():
            raise UserError(
                f"{self.model.config.name_or_path}: the model's scores are not finite in {self.model.dtype}; "
                "the checkpoint is broken or needs a wider dtype"
            )
        return logits

    def _plain_pass(self, texts: Sequence[list[int]]) -> torch.Tensor:
        """The logits of whole texts."""
        inputs = self._pad(texts)
        if self._is_causal:  # nothing looks at the padding, which is on the right; attention is faster without a mask
            del inputs["attention_mask"]
        logits: torch.Tensor = self.model(**inputs).logits
        return logits

    def _shared_pass(self, batch: SharedBatch, texts: Sequence[list[int]]) -> torch.Tensor:
        """The logits of texts in groups that begin alike: the prefixes once, then the rest of every text."""
        prefixes = self._pad([texts[group.members[0]][: group.shared] for group in batch.groups])
        cache = self.model.base_model(**prefixes, use_cache=True).past_key_values
        owners = torch.tensor(batch.owners, device=self.model.device)
        cache.batch_select_indices(owners)
        tails = self._pad([texts[index][group.shared :] for group in batch.groups for index in group.members])
        seen = torch.cat([prefixes["attention_mask"][owners], tails["attention_mask"]], dim=1)
        start = prefixes["attention_mask"].sum(dim=1)[owners]
        positions = start[:, None] + torch.arange(tails["input_ids"].shape[1], device=self.model.device)
        logits: torch.Tensor = self.model(
            input_ids=tails["input_ids"], attention_mask=seen, position_ids=positions, past_key_values=cache
        ).logits
        return logits

    def _pad(self, texts: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        inputs = pad(texts, self.model.config.get_text_config().pad_token_id)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}


def default_device() -> torch.device:
    """The machine's accelerator, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _is_causal(model: PreTrainedModel) -> bool:
    """Whether a token looks at those before it alone, at all of them, so that what comes later never changes it."""
    config = model.config.get_text_config()
    windows = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return hasattr(model, "score") and hasattr(model.base_model, "layers") and windows is None
