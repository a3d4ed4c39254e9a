"""Attention in float32 for bfloat16 models on a CPU: torch's bfloat16 backward pass is ten times slower there."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLOAT32 = "sdpa_in_float32"


def attention_for(dtype: torch.dtype) -> str:
    """The `attn_implementation` to train a model of this dtype with on this machine."""
    return FLOAT32 if dtype == torch.bfloat16 and not torch.cuda.is_available() else "sdpa"


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    seen, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return seen.to(query.dtype), None


AttentionInterface.register(FLOAT32, _attend)
AttentionMaskInterface.register(FLOAT32, sdpa_mask)
