"""A tiny model, samples for it, and a learner on it."""

import gc
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import groups
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.core.dataflow import Batch
from metaalign_rl.learner.batch import make_batch
from metaalign_rl.learner.worker import Learner
from metaalign_rl.ppo.advantages import gae, token_rewards, whiten

VOCABULARY = 50
CONFIG = LearnerConfig(
    learning_rate=1e-3,
    critic_learning_rate=1e-3,
    minibatch_size=1000,
    micro_batch_tokens=1000,
    max_grad_norm=100.0,
)


def make_samples(count: int = 12) -> list[tuple[list[int], list[int]]]:
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(draw.randint(low, high))]

    return [(ids(2, 9), ids(1, 6)) for _ in range(count)]


def tiny_model(path: Path, seed: int, kind: type = Qwen2ForCausalLM, **changes: object) -> Path:
    torch.manual_seed(seed)
    config = Qwen2Config(
        **{"tie_word_embeddings": False} | changes,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    kind(config).save_pretrained(path)
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(path)
    return path


def policy_and_reference(folder: Path) -> Path:
    tiny_model(folder / "policy", seed=1)
    tiny_model(folder / "reference", seed=2)
    return folder


@contextmanager
def own_process_group() -> Iterator[None]:
    """A learner makes its process a rank; the tests after these must not find themselves in one."""
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        groups._WORLD_GROUP = None  # DeepSpeed keeps the group that it found first
    gc.unfreeze()  # learners freeze what exists at their start, also what earlier ones left
    gc.collect()  # else their buffers add up, until the system refuses to start another process


def policy_weights(learner: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner.policy.module.parameters()])


def make_learner(
    folder: Path,
    config: LearnerConfig = CONFIG,
    rank: int = 0,
    world_size: int = 1,
    options: Mapping[str, Any] | None = None,
    **paths: str,
) -> Learner:
    meeting = f"file://{folder}/rendezvous{world_size}"
    learner = Learner(config, rank, world_size, meeting, **{"dtype": "float32", "seed": 0, **(options or {})})
    names = {"policy": "policy", "critic": "policy", "reference": "reference"} | paths
    learner.setup(*(folder / names[name] for name in ("policy", "critic", "reference")))
    return learner


class _Poisoned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def poison(engine: Any, factor: float) -> None:
    """Multiply the gradient of the embeddings by `factor`, such as NaN. The losses stay as they are."""
    embeddings = engine.module.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, found: _Poisoned.apply(found, factor))


def with_advantages(batch: Batch) -> Batch:
    scores = torch.rand(len(batch), generator=torch.Generator().manual_seed(0))
    rewards = token_rewards(scores, batch.logprobs, batch.ref_logprobs, batch.action_mask, kl_coef=0.01)
    advantages, returns = gae(rewards, batch.values, batch.action_mask, gamma=1.0, lam=0.9)
    return replace(batch, advantages=whiten(advantages, batch.action_mask), returns=returns)


def evaluated(learner: Learner, **rollout: object) -> Batch:
    batch = learner.evaluate(make_batch(make_samples(), pad_id=0, **rollout))
    assert batch is not None
    return with_advantages(batch)
