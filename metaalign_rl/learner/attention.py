"""The attention with which models are trained, and which models can read responses that share a prompt.

On a CPU, attention of bfloat16 models runs in float32: torch's bfloat16 backward pass is ten times slower there.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from metaalign_rl.core.errors import UserError
from reward.inference.exactness import attends_to_all

FLOAT32 = "sdpa_in_float32"


def attention_for(dtype: torch.dtype) -> str:
    """The `attn_implementation` to train a model of this dtype with on this machine."""
    return FLOAT32 if dtype == torch.bfloat16 and not torch.cuda.is_available() else "sdpa"


def require_shareable(path: Path) -> None:
    """Refuse `learner.share_prompts` for a model that would compute something else then; see `attends_to_all`.

    Raises:
        UserError: the model in the folder has a sliding window, recurrent layers or longrope.
    """
    if not attends_to_all(AutoConfig.from_pretrained(path).get_text_config()):
        raise UserError(
            f"learner.share_prompts: expected false for {path}: it has a sliding window, recurrent layers or longrope, "
            "so responses that share a prompt would get other log-probabilities"
        )


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    seen, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return seen.to(query.dtype), None


AttentionInterface.register(FLOAT32, _attend)
AttentionMaskInterface.register(FLOAT32, sdpa_mask)
