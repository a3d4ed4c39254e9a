"""DeepSpeed engines from a `LearnerConfig`, and whole weights out of them."""

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from metaalign_rl.learner.config import LearnerConfig


def deepspeed_config(config: LearnerConfig, dtype: torch.dtype, learning_rate: float | None) -> dict[str, Any]:
    """DeepSpeed's settings; without a learning rate, those of a frozen model.

    One micro-batch of one sample is what DeepSpeed is told: the learner weights its losses itself and says
    where an optimizer step ends, so that DeepSpeed's own arithmetic of batch sizes must not scale anything.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": None,
        "zero_optimization": zero,
    }
    if learning_rate is not None:
        settings |= _optimization(config, learning_rate)
        if config.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return settings


def _optimization(config: LearnerConfig, learning_rate: float) -> dict[str, Any]:
    """torch's own fused AdamW everywhere: DeepSpeed's has to be compiled at first use."""
    parameters = {"lr": learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    return {
        "optimizer": {"type": "AdamW", "params": {**parameters, "torch_adam": True, "fused": True}},
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": config.max_grad_norm,
    }


def build(load: Callable[[], nn.Module], config: LearnerConfig, learning_rate: float, dtype: torch.dtype) -> Any:
    """An engine that trains the model that `load` gives."""
    module = _load(load, config, dtype)
    if config.gradient_checkpointing:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    engine, *_ = deepspeed.initialize(
        model=module,
        config=deepspeed_config(config, dtype, learning_rate),
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
    engine, *_ = deepspeed.initialize(model=module, config=deepspeed_config(config, dtype, learning_rate=None))
    return engine


def _load(load: Callable[[], nn.Module], config: LearnerConfig, dtype: torch.dtype) -> nn.Module:
    # transformers looks this object up through a weak reference; at stage 3 it shards weights while it loads
    # them.
    sharding = HfDeepSpeedConfig(deepspeed_config(config, dtype, learning_rate=None))
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
    for name, parameter in model.named_parameters():
        sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
            if keep:
                weights[name] = parameter.detach().cpu().clone() if sharded else parameter.detach()
    if not keep:
        return {}
    saved = model.state_dict().keys()
    weights |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return revert_weight_conversion(model, weights)
