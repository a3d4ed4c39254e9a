"""Passes of a decoder over packs of texts, which compute only what the scores need."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from reward import model as checkpoints
from reward.inference.packing import Pack
from reward.inference.prefixes import group_by_prefix

ATTENTION = "metaalign_packed"
BEGINNING = [1, 2, 3, 4, 5, 6, 7] * 5
PROBES = ([*BEGINNING, 4, 5], [*BEGINNING, 5], [*BEGINNING, 6, 1, 2], [5, 4] * 9)  # token ids; three begin alike
PROBE_ERROR = {torch.float32: 1e-3}  # of the norm of the hidden states
PROBE_ERROR_NARROW = 0.05  # in narrower types


def pack_logits(model: PreTrainedModel, pack: Pack) -> Tensor:
    """The logits of a pack's texts, float32, [texts, labels]; the model is one that `reads_packs`."""
    logits: Tensor = checkpoints.head(model)(_last_hidden(model, pack))
    return logits.float()


@torch.inference_mode()
def reads_packs(model: PreTrainedModel) -> bool:
    """Whether a model gives packed texts the hidden states that it gives them one by one.

    It must be a decoder that looks at all earlier tokens in every layer, by its config. Whether its attention does
    anything else is tried on a few texts.
    """
    config = model.config.get_text_config()
    windows = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}  # windows, recurrent states
    if not hasattr(model, "score") or not hasattr(model.base_model, "layers") or windows is not None or others:
        return False
    pack = Pack()
    for group in group_by_prefix(PROBES):
        pack.add(group, PROBES)
    try:
        packed = _last_hidden(model, pack).float()
    except (AttributeError, RuntimeError, TypeError):  # another architecture, which takes no attention of ours
        return False
    inputs = [torch.tensor([PROBES[index]], device=model.device) for index in pack.texts]
    alone = torch.cat([model.base_model(ids, use_cache=False).last_hidden_state[:, -1] for ids in inputs]).float()
    return bool((packed - alone).norm() <= PROBE_ERROR.get(model.dtype, PROBE_ERROR_NARROW) * alone.norm())


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, scaling: float, pack: Pack, **_: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface, over a pack: [1, heads, tokens, size] to [1, tokens, heads, size]."""
    is_last = module.layer_idx == module.config.num_hidden_layers - 1
    output = query.new_zeros(query.transpose(1, 2).shape)
    for part in pack.last_attentions if is_last else pack.attentions:
        keys, values = (_join([x[:, :, span] for span in part.keys]) for x in (key, value))
        found = scaled_dot_product_attention(
            query[:, :, part.queries],
            keys,
            values,
            attn_mask=part.mask,
            is_causal=part.causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output[:, part.queries] = found.transpose(1, 2)
    return output, None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)  # a pack has masks of its own


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts], dim=2)  # without a copy, where one will do


def _last_hidden(model: PreTrainedModel, pack: Pack) -> Tensor:
    """The hidden states of the texts' last tokens, [texts, hidden]."""
    last = torch.tensor(pack.last, device=model.device)
    pack.move(model.device, model.dtype)
    with _packed_attention(model), _only(model.base_model.layers[-1].mlp, last, len(pack.tokens)):
        hidden = model.base_model(
            input_ids=torch.tensor([pack.tokens], device=model.device),
            position_ids=torch.tensor([pack.positions], device=model.device),
            use_cache=False,
            pack=pack,
        ).last_hidden_state
    return hidden[0, last]


@contextmanager
def _packed_attention(model: PreTrainedModel) -> Iterator[None]:
    own = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@contextmanager
def _only(layer: nn.Module, places: Tensor, length: int) -> Iterator[None]:
    """Let a feed-forward layer compute these places of a row alone, and leave 0 at the others."""

    def take(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0][:, places]

    def put_back(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output.new_zeros(1, length, output.shape[2]).index_copy_(1, places, output)

    handles = layer.register_forward_pre_hook(take), layer.register_forward_hook(put_back)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
