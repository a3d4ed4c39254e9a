"""Layers that compute the same with fewer passes over memory."""

import pytest
import torch
from reward_toys import reward_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GemmaConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from reward import Scorer
from reward.inference.streamline import GatedFeedForward, RMSNorm, streamline

SMALL = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "num_labels": 4,
}  # fmt: skip
TOKENS = torch.randint(1, 32, (3, 20), generator=torch.Generator().manual_seed(0))


def kinds(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(layer, kind) for layer in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LlamaConfig(**SMALL), Qwen3Config(**SMALL)], ids=["llama", "qwen3"])
@torch.inference_mode()
def test_replaced_layers_leave_the_logits_as_they_are(config: object, dtype: torch.dtype) -> None:
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()
    nn.init.normal_(model.score.weight)
    before, weights = model(TOKENS).logits.float(), model.state_dict()
    streamline(model)
    assert kinds(model, RMSNorm) >= 5 and kinds(model, GatedFeedForward) == 2
    assert model.state_dict().keys() == weights.keys()
    off = (model(TOKENS).logits.float() - before).norm() / before.norm()
    assert off < (1e-5 if dtype == torch.float32 else 0.02)


@torch.inference_mode()
def test_a_layer_of_another_form_stays() -> None:
    """Gemma's norm multiplies by 1 + weight, and its feed-forward layer has another activation."""
    model = AutoModelForSequenceClassification.from_config(GemmaConfig(**SMALL)).eval()
    before = model(TOKENS).logits
    streamline(model)
    assert kinds(model, RMSNorm) == kinds(model, GatedFeedForward) == 0
    assert torch.equal(model(TOKENS).logits, before)


@torch.inference_mode()
def test_a_layer_that_wants_more_than_one_input_stays() -> None:
    """Qwen3-Next's gated norm."""
    config = Qwen3NextConfig(**SMALL, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    streamline(model)
    assert model(TOKENS, use_cache=False).logits.isfinite().all()


def test_an_encoder_s_scores_in_bfloat16_are_not_coarse() -> None:
    config = BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=4)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).eval()
    streamline(model)
    with torch.inference_mode():
        logits = model(torch.randint(1, 32, (300, 9), generator=torch.Generator().manual_seed(0))).logits
    assert logits.dtype == torch.float32
    assert len(logits[:, 0].unique()) > 250


def test_a_loaded_scorer_has_them() -> None:
    assert kinds(Scorer.from_pretrained(reward_model(), device="cpu").model, GatedFeedForward) == 2
