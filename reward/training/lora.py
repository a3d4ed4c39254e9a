"""LoRA: a linear layer's update is the product of two narrow matrices (Hu et al. 2021, arXiv:2106.09685)."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from metaalign_rl.core.errors import UserError

MISSING = "lora_rank: adapters need peft, which is not installed: pip install metaalign-rl[lora]"


def add_lora(model: PreTrainedModel, rank: int, alpha: float) -> nn.Module:
    """Add an adapter to each linear layer of the backbone. Only the adapters and the head are trained.

    The adapters have no dropout, like the rest of the model: the same model must read both answers of a pair.

    Args:
        model: changed in place; the result computes with the same object.
        rank: the inner dimension of the two matrices.
        alpha: the product of the matrices is scaled by alpha / rank.

    Returns:
        The model with adapters, to be trained.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError(MISSING) from None
    backbone = model.base_model
    heads = [
        name for name, part in model.named_children() if part is not backbone and any(True for _ in part.parameters())
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=linear_layers(model),
        modules_to_save=heads,
    )
    return get_peft_model(model, config)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The names of the backbone's linear layers."""
    layers = [name for name, layer in model.base_model.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    return [f"{model.base_model_prefix}.{name}" for name in layers]


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights of the model that `add_lora` received, which is a plain model again."""
    model.merge_and_unload()
