"""DeepSpeed's settings, key by key, for each model that is trained with it."""

from dataclasses import replace

import pytest

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.runtime import deepspeed_config

LEARNER = LearnerConfig(zero_stage=2, betas=(0.8, 0.9), weight_decay=0.1, max_grad_norm=0.5)


def test_settings_of_a_trained_model_of_a_learner() -> None:
    found = deepspeed_config.for_learner(LEARNER, bf16=True, learning_rate=1e-3, pin_memory=True)
    assert found == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "steps_per_print": None,
        "zero_optimization": {"stage": 2},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-3, "betas": (0.8, 0.9), "weight_decay": 0.1, "torch_adam": True, "fused": True},
        },
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.5,
    }


@pytest.mark.parametrize("pin_memory", [False, True])
def test_an_offloaded_optimizer_is_kept_in_main_memory(pin_memory: bool) -> None:
    config = replace(LEARNER, offload_optimizer=True)
    found = deepspeed_config.for_learner(config, bf16=False, learning_rate=1e-3, pin_memory=pin_memory)
    offload = {"device": "cpu", "pin_memory": pin_memory}
    assert found["zero_optimization"] == {"stage": 2, "offload_optimizer": offload}
    assert found["bf16"] == {"enabled": False}


def test_a_frozen_model_of_a_learner_has_no_optimizer() -> None:
    config = replace(LEARNER, zero_stage=3, offload_optimizer=True)
    assert deepspeed_config.for_learner(config, bf16=False, learning_rate=None, pin_memory=True) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": False},
        "steps_per_print": None,
        "zero_optimization": {"stage": 3},
    }


def test_settings_of_sft() -> None:
    assert deepspeed_config.for_sft(1) == {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }


@pytest.mark.parametrize("bf16", [False, True])
def test_settings_of_reward_training(bf16: bool) -> None:
    assert deepspeed_config.for_reward(2, bf16=bf16) == {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
