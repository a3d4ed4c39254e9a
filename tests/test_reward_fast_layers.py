"""Fast layers compute the same as the layers that they replace."""

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
from reward.inference.fast_layers import GatedFeedForward, RMSNorm, use_fast_layers

SMALL = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "num_labels": 4,
}  # fmt: skip
TOKENS = torch.randint(1, 32, (3, 20), generator=torch.Generator().manual_seed(0))


def number_of(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(layer, kind) for layer in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LlamaConfig(**SMALL), Qwen3Config(**SMALL)], ids=["llama", "qwen3"])
@torch.inference_mode()
def test_fast_layers_keep_the_logits(config: object, dtype: torch.dtype) -> None:
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()
    nn.init.normal_(model.score.weight)
    before, weights = model(TOKENS).logits.float(), model.state_dict()
    use_fast_layers(model)
    assert number_of(model, RMSNorm) >= 5 and number_of(model, GatedFeedForward) == 2
    assert model.state_dict().keys() == weights.keys()
    difference = (model(TOKENS).logits.float() - before).norm() / before.norm()
    assert difference < (1e-5 if dtype == torch.float32 else 0.02)


@torch.inference_mode()
def test_a_layer_of_another_form_is_not_replaced() -> None:
    """Gemma's norm multiplies by 1 + weight, and its feed-forward layer has another activation."""
    model = AutoModelForSequenceClassification.from_config(GemmaConfig(**SMALL)).eval()
    before = model(TOKENS).logits
    use_fast_layers(model)
    assert number_of(model, RMSNorm) == number_of(model, GatedFeedForward) == 0
    assert torch.equal(model(TOKENS).logits, before)


@torch.inference_mode()
def test_a_layer_with_more_than_one_input_is_not_replaced() -> None:
    """Qwen3-Next has a gated norm."""
    config = Qwen3NextConfig(**SMALL, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    use_fast_layers(model)
    assert model(TOKENS, use_cache=False).logits.isfinite().all()


def test_an_encoders_scores_in_bfloat16_are_not_rounded() -> None:
    config = BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=4)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).eval()
    use_fast_layers(model)
    with torch.inference_mode():
        logits = model(torch.randint(1, 32, (300, 9), generator=torch.Generator().manual_seed(0))).logits
    assert logits.dtype == torch.float32
    assert len(logits[:, 0].unique()) > 250


def test_a_loaded_scorer_has_fast_layers() -> None:
    assert number_of(Scorer.from_pretrained(reward_model(), device="cpu").model, GatedFeedForward) == 2
