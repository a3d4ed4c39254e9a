"""Layers of a loaded model, replaced by ones that make fewer passes over memory, and a head that does not round.

On a CPU, half of a small model's time in bfloat16 goes into tensors that are written once and read once. Only for
models that are scored with: some results are computed in place, which training could not go back through.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel

from reward import model as checkpoints

SAMPLE = 4  # made-up tokens on which a layer and its replacement are compared
ALIKE = 0.02  # of the norm of what a layer computes; bfloat16 rounds by less, another formula does not


@torch.inference_mode()
def streamline(model: PreTrainedModel) -> None:
    """Replace the head, and RMS norms and gated feed-forward layers of the usual form; weights stay where they are."""
    head = checkpoints.head(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if layer is head:
                setattr(parent, name, Float32Head(layer))
                continue
            replacement = _replacement(layer)
            if replacement is not None and _alike(layer, *replacement):
                setattr(parent, name, replacement[0])


class Float32Head(nn.Linear):
    """A linear layer that computes in float32: scores in bfloat16 would be coarse, and many of them equal."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight (Zhang and Sennrich 2019, arXiv:1910.07467), the mean in float32.

    In bfloat16 the root is rounded once more than in the layer that it stands for.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self._epsilon = layer.weight, layer.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square_() / x.shape[-1]).add_(self._epsilon).rsqrt_()
        return (x * scale.to(x.dtype)).mul_(self.weight)


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)) (SwiGLU: Shazeer 2020, arXiv:2002.05202), with two wide tensors instead of four."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = layer.gate_proj, layer.up_proj, layer.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))


def _replacement(layer: nn.Module) -> tuple[nn.Module, int] | None:
    """What may stand for a layer, and the width of its input."""
    if hasattr(layer, "variance_epsilon") and isinstance(getattr(layer, "weight", None), Tensor):
        return RMSNorm(layer), len(layer.weight)
    if all(isinstance(getattr(layer, f"{name}_proj", None), nn.Linear) for name in ("gate", "up", "down")):
        return GatedFeedForward(layer), layer.gate_proj.in_features
    return None


def _alike(layer: Callable[[Tensor], Tensor], replacement: nn.Module, width: int) -> bool:
    weight = next(replacement.parameters())
    x = torch.randn(1, SAMPLE, width, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        expected = layer(x).float()
    except (AttributeError, RuntimeError, TypeError):  # it wants more than x, such as a gate
        return False
    found = replacement(x).float()
    return bool((found - expected).norm() <= ALIKE * expected.norm())
