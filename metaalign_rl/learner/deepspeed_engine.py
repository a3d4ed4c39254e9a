"""DeepSpeed engines from a `LearnerConfig`, and whole weights out of them."""

import re
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.core.units import MIB
from metaalign_rl.runtime import deepspeed_config

GATHERED_BYTES = 256 * MIB  # at a time, where all weights are wanted in the end


def _settings(config: LearnerConfig, dtype: torch.dtype, learning_rate: float | None = None) -> dict[str, Any]:
    """DeepSpeed's settings; without a learning rate, those of a frozen model."""
    bf16, cuda = dtype == torch.bfloat16, torch.cuda.is_available()
    return deepspeed_config.for_learner(config, bf16=bf16, learning_rate=learning_rate, pin_memory=cuda)


def build(load: Callable[[], nn.Module], config: LearnerConfig, learning_rate: float, dtype: torch.dtype) -> Any:
    """An engine that trains the model that `load` gives."""
    module = _load(load, config, dtype)
    if config.gradient_checkpointing:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    engine, *_ = deepspeed.initialize(
        model=module,
        config=_settings(config, dtype, learning_rate),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, config.rate_factor),
    )
    # Checkpointing works in training mode alone; nothing else of that mode is wanted.
    engine.train(config.gradient_checkpointing)
    return engine


def build_frozen(
    load: Callable[[], nn.Module], config: LearnerConfig, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The model that `load` gives, for evaluation only: sharded under ZeRO-3, else whole on each rank."""
    module = _load(load, config, dtype).requires_grad_(False).eval()
    if config.zero_stage < 3:
        return module.to(device)
    engine, *_ = deepspeed.initialize(model=module, config=_settings(config, dtype))
    return engine


def _load(load: Callable[[], nn.Module], config: LearnerConfig, dtype: torch.dtype) -> nn.Module:
    # transformers looks this object up through a weak reference; at stage 3 it shards weights while
    # it loads them.
    sharding = HfDeepSpeedConfig(_settings(config, dtype))
    module = load()
    del sharding
    return module


def whole_weights(model: PreTrainedModel, keep: bool) -> dict[str, Tensor]:
    """The weights under the names of a Hugging Face checkpoint; tied ones once. Every rank must call it.

    Args:
        keep: whether this rank wants them; the others only take part in gathering and get an empty
            dictionary. Copies on the CPU under ZeRO-3, else the live tensors.
    """
    weights: dict[str, Tensor] = {}
    sharded = is_sharded(model)
    for name, tensor in stream_weights(model, GATHERED_BYTES):
        if keep:
            weights[name] = tensor.cpu().clone() if sharded else tensor
    return weights


def stream_weights(model: PreTrainedModel, gathered_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of a Hugging Face checkpoint, one at a time; tied ones once.

    Under ZeRO-3 about `gathered_bytes` are gathered at a time, and a tensor is to be copied before the next one is
    taken: every rank must go through all of them.
    """
    sharded = is_sharded(model)
    for group in _groups(model, gathered_bytes):
        with deepspeed.zero.GatheredParameters(list(group.values()), enabled=sharded):
            yield from revert_weight_conversion(
                model, {name: weight.detach() for name, weight in group.items()}
            ).items()
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    yield from revert_weight_conversion(model, buffers).items()


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a part of every weight (ZeRO-3)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _groups(model: PreTrainedModel, most_bytes: int) -> Iterator[dict[str, nn.Parameter]]:
    """Neighbouring parameters of up to `most_bytes` together, or one unit that is larger.

    A unit is a parameter; or a layer, where transformers joins a checkpoint's tensors as it loads them: what it joined
    must be together to be taken apart.
    """
    group: dict[str, nn.Parameter] = {}
    used = 0
    by_layer = getattr(model, "_weight_conversions", None)
    for _, unit in groupby(model.named_parameters(), lambda item: _layer(item[0]) if by_layer else item[0]):
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
    """`model.layers.3` of `model.layers.3.mlp.experts.7.w1`: up to the outermost number; "" where there is none."""
    return found[0] if (found := re.match(r".*?\.\d+(?=\.)", name)) else ""
