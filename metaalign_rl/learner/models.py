"""Policy and critic: Hugging Face models that compute their outputs at response tokens only."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from metaalign_rl.config.learner import HEAD_LOGITS
from metaalign_rl.core.checkpoints import disable_dropout, is_reward_model, require_loadable, tensors_of
from metaalign_rl.core.errors import UserError
from metaalign_rl.learner.attention import attention_for
from metaalign_rl.learner.lora import Lora, add_adapter, without_adapters
from metaalign_rl.learner.micro_batches import Inputs
from metaalign_rl.learner.openrlhf_modules import openrlhf_module

HEAD_DEVIATION = 0.01  # for a new value head's weights, so that values start near 0
HEADS = ("score.", "classifier.")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


class Policy(nn.Module):
    """A causal language model that returns the log-probabilities of response tokens.

    Logits are most of the memory of a large vocabulary: 16 bytes each with their gradients. So they are computed for
    `HEAD_LOGITS` at a time, and again in the backward pass.

    Args:
        temperature: divides the logits, so that the log-probabilities are those of tokens sampled at it.
    """

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self._temperature = model, temperature

    def forward(
        self, inputs: Inputs, entropy: bool = False, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability [N], and with `entropy` the entropy [N], of the N response tokens, row by row; float32."""
        hidden = inputs.run(self.model.get_decoder()).last_hidden_state.flatten(0, 1)[inputs.sources]
        rows = max(1, HEAD_LOGITS // self.model.config.get_text_config().vocab_size)
        score = partial(self._score, entropy=entropy, entropy_gradient=entropy_gradient)
        if len(hidden) > rows and torch.is_grad_enabled():
            score = partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
        parts = [score(*part) for part in zip(hidden.split(rows), inputs.tokens.split(rows), strict=True)]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies) if entropy else None

    def _score(
        self, hidden: Tensor, tokens: Tensor, entropy: bool, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        logits = self._logits(hidden).float()
        if self._temperature != 1:
            logits = logits / self._temperature
        logprobs = openrlhf_module("models.utils").log_probs_from_logits(logits, tokens)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            return logprobs, _entropy(logits) if entropy else None

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocabulary] of the decoder's outputs [n, size], from the model's own forward pass.

        The output layer alone is not enough: some models scale their logits or cap them.
        """
        decoder = self.model.get_decoder()
        decoder.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden[None])
        try:
            logits: Tensor = self.model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            del decoder.forward
        return logits


class Unadapted:
    """The policy without its adapters, as a reference that needs no memory.

    Args:
        policy: a `Policy` in a DeepSpeed engine.
    """

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """See `Policy.forward`."""
        with without_adapters(self._policy.module):
            found: tuple[Tensor, Tensor | None] = self._policy(inputs)
        return found


def _entropy(logits: Tensor) -> Tensor:
    logprobs = torch.log_softmax(logits, dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


class Critic(nn.Module):
    """A token classifier with one label, the value of the text up to each token."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        """Value [N] of the text before each of the N response tokens, row by row; float32."""
        values: Tensor = inputs.run(self.model).logits.flatten()  # there is one label
        return values[inputs.sources]


class Float32Head(nn.Linear):
    """A linear layer that computes in float32, whatever the type of its weights. It takes over `head`'s parameters.

    In bfloat16, values would have three digits, and the differences between neighbouring ones would be lost.
    DeepSpeed's optimizer keeps float32 copies of the weights.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs, float32."""
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(inputs.float(), self.weight.float(), bias)


def load_policy(path: Path, dtype: torch.dtype, temperature: float = 1.0, lora: Lora | None = None) -> Policy:
    """The causal language model in the folder `path`, with a new adapter if `lora` is given.

    Raises:
        UserError: see `require_loadable`.
    """
    require_loadable(path)
    model = AutoModelForCausalLM.from_pretrained(path, config=_config(path), **_options(dtype))
    if lora is not None:
        add_adapter(model, lora)
    return Policy(model, temperature)


def load_critic(path: Path, dtype: torch.dtype, seed: int) -> Critic:
    """A critic checkpoint, or any language or reward model with a new value head on its backbone.

    Raises:
        UserError: see `require_loadable`; or the backbone's weights are not in the checkpoint.
    """
    require_loadable(path)
    config = _config(path, num_labels=1, classifier_dropout=0.0)
    weights = {"state_dict": _without_head(path)} if is_reward_model(path) else {}
    where = None if weights else path
    kind = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(config)]  # the Auto class needs a folder
    model, loading = kind.from_pretrained(where, config=config, output_loading_info=True, **weights, **_options(dtype))
    fresh = set(loading["missing_keys"])
    backbone = sorted(name for name in fresh if name.startswith(f"{model.base_model_prefix}."))
    if backbone:
        raise UserError(
            f"{path}: expected all weights of the model, found none for {backbone[0]}; save the checkpoint again"
        )
    _initialise(model, fresh, seed)
    for name in HEADS:
        if isinstance(head := getattr(model, name.rstrip("."), None), nn.Linear):
            setattr(model, name.rstrip("."), Float32Head(head))
    return Critic(model)


def _without_head(path: Path) -> dict[str, Tensor]:
    """A reward model's weights without its head, which has the critic head's name but another shape.

    transformers can ignore it automatically, but not with ZeRO-3.
    """
    return {name: tensor for name, tensor in tensors_of(path) if not name.startswith(HEADS)}


def _initialise(model: PreTrainedModel, names: set[str], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    head = {name: parameter for name, parameter in model.named_parameters() if name in names}
    sharded = any(hasattr(parameter, "ds_id") for parameter in head.values())
    with deepspeed.zero.GatheredParameters(list(head.values()), modifier_rank=0, enabled=sharded):
        for name, parameter in head.items():
            scale = 0.0 if name.endswith("bias") else HEAD_DEVIATION
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer and its chat template file by file, so that nothing changes."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _config(path: Path, **changes: Any) -> Any:
    """The config with dropout off. Otherwise the ratio of new to old probabilities would be noisy."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, **changes)
    disable_dropout(config)
    return config


def _options(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "attn_implementation": attention_for(dtype),
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
    }
