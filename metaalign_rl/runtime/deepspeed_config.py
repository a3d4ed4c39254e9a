"""DeepSpeed's settings for the learners, SFT and the reward model. Imports no heavy packages.

The keys are explained on https://www.deepspeed.ai/docs/config-json/.
"""

from typing import Any, Literal, TypeAlias

from metaalign_rl.config.learner import LearnerConfig

ZeroStage: TypeAlias = Literal[0, 1, 2, 3]
Settings: TypeAlias = dict[str, Any]
_Auto = Literal["auto"]  # transformers' Trainer fills in the value of its own argument


def for_learner(config: LearnerConfig, *, bf16: bool, learning_rate: float | None, pin_memory: bool) -> Settings:
    """Settings of one model of a learner.

    DeepSpeed gets a batch size of 1 and no gradient accumulation, so that it scales nothing: the learner weights its
    losses and marks the optimizer steps.

    Args:
        bf16: the weights are bfloat16, with float32 master weights.
        learning_rate: learning rate of the first step; None: the model is frozen and has no optimizer.
        pin_memory: page-lock the offloaded optimizer states; needs CUDA.
    """
    settings = _base(config.zero_stage, batch_size=1) | {"bf16": {"enabled": bf16}, "steps_per_print": None}
    if learning_rate is None:
        return settings
    if config.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    adam = {"lr": learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    return settings | {
        # torch's fused AdamW on all devices: DeepSpeed's AdamW is compiled at first use.
        "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True, "fused": True}},
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": config.max_grad_norm,
    }


def for_sft(zero_stage: ZeroStage) -> Settings:
    """Settings of SFT with transformers' Trainer."""
    return _trainer(zero_stage, gradient_clipping=1.0) | {"bf16": {"enabled": "auto"}}


def for_reward(zero_stage: ZeroStage, *, bf16: bool) -> Settings:
    """Settings of reward training with transformers' Trainer: float32 weights, as on one device.

    Args:
        bf16: compute in bfloat16 (autocast).
    """
    autocast = {"enabled": bf16, "dtype": "bfloat16"}
    return _trainer(zero_stage, gradient_clipping="auto") | {"torch_autocast": autocast}


def _trainer(zero_stage: ZeroStage, gradient_clipping: float | _Auto) -> Settings:
    """The optimizer is the Trainer's. DeepSpeed accepts it under ZeRO only with `zero_allow_untested_optimizer`."""
    return _base(zero_stage, batch_size="auto") | {
        "gradient_clipping": gradient_clipping,
        "zero_allow_untested_optimizer": True,
    }


def _base(zero_stage: ZeroStage, batch_size: int | _Auto) -> Settings:
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": batch_size,
        "zero_optimization": {"stage": zero_stage},
    }
