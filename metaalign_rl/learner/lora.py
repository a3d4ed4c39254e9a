"""LoRA for the policy: adapters in the backbone's linear layers (Hu et al. 2021, arXiv:2106.09685), from peft.

The policy without its adapters is the reference. Engines and checkpoints get the merged weights, W + scaling * B A,
under the names of a plain model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reward.training.lora import linear_layers

NAME = "default"  # of the adapter, in the names of its weights
_BASE, _ADAPTER = ".base_layer.", ".lora_"  # in the names of an adapted layer's weights


class Lora(NamedTuple):
    """A new adapter.

    Attributes:
        rank: inner dimension of the two matrices.
        alpha: their product is scaled by alpha / rank.
        seed: of the first matrix. The second one is 0, so a new adapter changes nothing.
    """

    rank: int
    alpha: float
    seed: int


def add_adapter(model: PreTrainedModel, lora: Lora) -> None:
    """Add an adapter to each linear layer of the backbone, in place. Only the adapters are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=linear_layers(model))
    with torch.random.fork_rng():
        torch.manual_seed(lora.seed)
        inject_adapter_in_model(config, model, NAME)
    for name, weight in model.named_parameters():
        weight.requires_grad_(_ADAPTER in name)


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return any(_ADAPTER in name for name, _ in model.named_parameters())


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as if it had no adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def unit_of(name: str) -> str:
    """The layer that a weight belongs to, if it is adapted; else the weight's own name."""
    return name.partition(_BASE)[0].partition(_ADAPTER)[0]


def merged(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a plain model, by name. The sum is computed in float32 and rounded to the weight's type.

    Args:
        weights: named parameters of `model`; of an adapted layer, all of them.
    """
    plain = {}
    for name, weight in weights.items():
        layer, is_base, kind = name.partition(_BASE)
        if is_base and kind == "weight":
            weight = (weight.float() + _update(model.get_submodule(layer))).to(weight.dtype)
        if _ADAPTER not in name:
            plain[name.replace(_BASE, ".")] = weight
    return plain


def _update(layer: Any) -> Tensor:
    """scaling * B A, float32. `Conv1D` keeps its weight transposed."""
    update = layer.lora_B[NAME].weight.detach().float() @ layer.lora_A[NAME].weight.detach().float()
    scaled: Tensor = update * layer.scaling[NAME]
    return scaled.T if layer.fan_in_fan_out else scaled
