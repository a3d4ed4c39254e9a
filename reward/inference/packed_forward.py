"""A decoder's forward pass over a pack, which computes only what the scores need."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from reward.inference.exactness import attends_to_all
from reward.inference.packing import Pack
from reward.inference.prefixes import group_by_prefix
from reward.model import head, scores_every_token

ATTENTION = "metaalign_packed"
PREFIX = [1, 2, 3, 4, 5, 6, 7] * 5
PROBES = ([*PREFIX, 4, 5], [*PREFIX, 5], [*PREFIX, 6, 1, 2], [5, 4] * 9)  # token ids; three share a prefix
PROBE_ERROR = {torch.float32: 1e-3}  # largest difference of the hidden states, relative to their norm
PROBE_ERROR_NARROW = 0.05  # the same in narrower types


def pack_logits(model: PreTrainedModel, pack: Pack) -> Tensor:
    """The logits of a pack's texts, float32, [texts, labels]. The model must support packing."""
    logits: Tensor = head(model)(_last_hidden(model, pack))
    return logits.float()


@torch.inference_mode()
def supports_packing(model: PreTrainedModel) -> bool:
    """Whether a model computes the same hidden states for packed texts as for each text alone.

    By its config, the model must be a decoder that attends to all earlier tokens in every layer; see `attends_to_all`.
    A few probe texts show whether its attention does anything else.
    """
    is_decoder = scores_every_token(model) and hasattr(model.base_model, "layers")
    if not is_decoder or not attends_to_all(model.config.get_text_config()):
        return False
    pack = Pack()
    for group in group_by_prefix(PROBES):
        pack.add(group, PROBES)
    try:
        packed = _last_hidden(model, pack).float()
    except (AttributeError, RuntimeError, TypeError):  # an architecture that ignores the attention interface
        return False
    inputs = [torch.tensor([PROBES[index]], device=model.device) for index in pack.texts]
    alone = torch.cat([model.base_model(ids, use_cache=False).last_hidden_state[:, -1] for ids in inputs]).float()
    return bool((packed - alone).norm() <= PROBE_ERROR.get(model.dtype, PROBE_ERROR_NARROW) * alone.norm())


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, scaling: float, pack: Pack, **_: Any
) -> tuple[Tensor, None]:
    """Attention over a pack, for transformers' attention interface.

    Args:
        query, key, value: [1, heads, tokens, size]; keys and values may have fewer heads.
        mask: not used; the pack has its own masks.

    Returns:
        [1, tokens, heads, size], and None in place of the attention weights.
    """
    is_last = module.layer_idx == module.config.num_hidden_layers - 1
    output = query.new_zeros(query.transpose(1, 2).shape)
    for block in pack.last_attentions if is_last else pack.attentions:
        keys, values = (_join([x[:, :, span] for span in block.keys]) for x in (key, value))
        attended = scaled_dot_product_attention(
            query[:, :, block.queries],
            keys,
            values,
            attn_mask=block.mask,
            is_causal=block.causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output[:, block.queries] = attended.transpose(1, 2)
    return output, None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)  # the pack has its own masks


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts], dim=2)  # a single part needs no copy


def _last_hidden(model: PreTrainedModel, pack: Pack) -> Tensor:
    """The hidden states of the texts' last tokens, [texts, hidden]."""
    last = torch.tensor(pack.last, device=model.device)
    pack.move(model.device, model.dtype)
    with _packed_attention(model), _only_at(model.base_model.layers[-1].mlp, last, len(pack.tokens)):
        hidden = model.base_model(
            input_ids=torch.tensor([pack.tokens], device=model.device),
            position_ids=torch.tensor([pack.positions], device=model.device),
            use_cache=False,
            pack=pack,
        ).last_hidden_state
    return hidden[0, last]


@contextmanager
def _packed_attention(model: PreTrainedModel) -> Iterator[None]:
    original = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(original)


@contextmanager
def _only_at(layer: nn.Module, indices: Tensor, length: int) -> Iterator[None]:
    """Let a feed-forward layer compute only these tokens of a sequence; the others become 0."""

    def select(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0][:, indices]

    def scatter(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output.new_zeros(1, length, output.shape[2]).index_copy_(1, indices, output)

    handles = layer.register_forward_pre_hook(select), layer.register_forward_hook(scatter)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
