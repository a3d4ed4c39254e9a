"""Whether a model computes the same for the answers of a pair that share a line as for separate answers."""

import torch
from transformers import PreTrainedModel

from metaalign_rl.core.batching import Line, lay_out
from reward.inference.exactness import attends_to_all
from reward.model import scores_every_token

PREFIX = [1, 2, 3, 4, 5, 6, 7] * 3  # token ids
TAILS = ([4, 5, 1], [5], [6, 1, 2, 7, 3])
MAX_ERROR = 1e-3  # largest difference of the hidden states, relative to their norm, in float32


@torch.no_grad()
def supports_shared_lines(model: PreTrainedModel) -> bool:
    """Compare a few texts that share a line with the same texts alone.

    Elsewhere a sliding window would be lost in training, though not in scoring, and a recurrent layer would read the
    chosen answer before the rejected one. The config decides where short texts cannot; see `attends_to_all`.
    """
    if not scores_every_token(model) or not attends_to_all(model.config.get_text_config()):
        return False
    lines = lay_out([Line(PREFIX, TAILS)], pad_token=0)
    inputs = {"input_ids": lines.input_ids, "position_ids": lines.position_ids, "attention_mask": lines.attention_mask}
    try:
        shared = _hidden(model, **inputs)[0]
    except (AttributeError, RuntimeError, TypeError, ValueError):  # an architecture without such masks
        return False
    expected = [_hidden(model, input_ids=torch.tensor([[*PREFIX, *tail]]))[0, len(PREFIX) :] for tail in TAILS]
    found = [shared[start:end] for _, start, end in lines.spans]
    error = torch.cat(found) - torch.cat(expected)
    return bool(error.norm() <= MAX_ERROR * torch.cat(expected).norm())


def _hidden(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """The hidden states, float32, [texts, tokens, hidden]."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return model.base_model(**inputs, use_cache=False).last_hidden_state.float()
