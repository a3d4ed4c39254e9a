"""Build DeepSpeed engines from a `LearnerConfig`, and read full weights out of them."""

import re
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.core.units import MIB
from metaalign_rl.learner.lora import is_adapted, merged, unit_of
from metaalign_rl.runtime import deepspeed_config

REDUCE_BUCKET = 500_000_000  # DeepSpeed's default; it keeps a buffer for so many gradients, even for a small model
GATHERED_BYTES = 256 * MIB  # gathered at a time when all weights are collected


def _settings(config: LearnerConfig, dtype: torch.dtype, learning_rate: float | None = None) -> dict[str, Any]:
    """DeepSpeed's settings. Without a learning rate, those of a frozen model."""
    bf16, cuda = dtype == torch.bfloat16, torch.cuda.is_available()
    return deepspeed_config.for_learner(config, bf16=bf16, learning_rate=learning_rate, pin_memory=cuda)


def build(load: Callable[[], nn.Module], config: LearnerConfig, learning_rate: float, dtype: torch.dtype) -> Any:
    """An engine that trains the model returned by `load`."""
    module = _load(load, config, dtype)
    if config.gradient_checkpointing:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = _settings(config, dtype, learning_rate)
    settings["zero_optimization"]["reduce_bucket_size"] = min(REDUCE_BUCKET, _numbers(module))
    engine, *_ = deepspeed.initialize(
        model=module,
        config=settings,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, config.rate_factor),
    )
    # Gradient checkpointing works in training mode only. Dropout is off in either mode.
    engine.train(config.gradient_checkpointing)
    return engine


def _numbers(module: nn.Module) -> int:
    """Number of weights, on all ranks together."""
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in module.parameters())


def build_frozen(
    load: Callable[[], nn.Module], config: LearnerConfig, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The model returned by `load`, for evaluation only. Sharded with ZeRO-3, else complete on each rank."""
    module = _load(load, config, dtype).requires_grad_(False).eval()
    if config.zero_stage < 3:
        return module.to(device)
    engine, *_ = deepspeed.initialize(model=module, config=_settings(config, dtype))
    return engine


def _load(load: Callable[[], nn.Module], config: LearnerConfig, dtype: torch.dtype) -> nn.Module:
    # transformers finds this object through a weak reference. With stage 3 it shards weights while loading them.
    sharding = HfDeepSpeedConfig(_settings(config, dtype))
    module = load()
    del sharding
    return module


def full_weights(model: PreTrainedModel, keep: bool) -> dict[str, Tensor]:
    """The weights under the names of a Hugging Face checkpoint; tied weights once. Every rank must call it.

    Args:
        keep: whether this rank needs them. Other ranks only take part in gathering.

    Returns: copies on the CPU with ZeRO-3 or adapters, else the live tensors; empty without `keep`.
    """
    weights: dict[str, Tensor] = {}
    copies = is_sharded(model) or is_adapted(model)
    for name, tensor in stream_weights(model, GATHERED_BYTES):
        if keep:
            weights[name] = tensor.cpu().clone() if copies else tensor
    return weights


def stream_weights(model: PreTrainedModel, gathered_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of a Hugging Face checkpoint, one at a time; tied weights once; adapters merged.

    With ZeRO-3, about `gathered_bytes` are gathered at a time. Copy a tensor before asking for the next one. Every rank
    must iterate to the end.
    """
    sharded = is_sharded(model)
    for group in _groups(model, gathered_bytes):
        with deepspeed.zero.GatheredParameters(list(group.values()), enabled=sharded):
            plain = merged(model, {name: weight.detach() for name, weight in group.items()})
            yield from revert_weight_conversion(model, plain).items()
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    yield from revert_weight_conversion(model, buffers).items()


def offload_states(engine: Any) -> None:
    """Move the float32 weights, the gradients and the optimizer states to main memory; `reload_states` undoes it."""
    moved = [OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.optim_states]
    engine.offload_states(include=moved, pin_memory=torch.cuda.is_available())


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a shard of every weight (ZeRO-3)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _groups(model: PreTrainedModel, most_bytes: int) -> Iterator[dict[str, nn.Parameter]]:
    """Groups of neighbouring units with up to `most_bytes`, or one larger unit.

    A unit is one parameter, or the weights of a linear layer with an adapter. If transformers merges tensors of a
    checkpoint when loading it, a unit is a layer, because splitting merged tensors needs all parameters of the layer.
    """
    group: dict[str, nn.Parameter] = {}
    used = 0
    by_layer = getattr(model, "_weight_conversions", None)
    for _, unit in groupby(model.named_parameters(), lambda item: (_layer if by_layer else unit_of)(item[0])):
        named = dict(unit)
        size = sum(getattr(weight, "ds_numel", weight.numel()) * weight.element_size() for weight in named.values())
        if group and used + size > most_bytes:
            yield group
            group, used = {}, 0
        group |= named
        used += size
    if group:
        yield group


def _layer(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.experts.7.w1`: the name up to its first number; "" without a number."""
    return found[0] if (found := re.match(r".*?\.\d+(?=\.)", name)) else ""
