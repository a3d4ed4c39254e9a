"""LoRA: what a linear layer learns as the product of two narrow matrices (Hu et al. 2021, arXiv:2106.09685)."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from metaalign_rl.core.errors import UserError

MISSING = "lora_rank: adapters need peft, which is not installed: pip install metaalign-rl[lora]"


def add_lora(model: PreTrainedModel, rank: int, alpha: float) -> nn.Module:
    """The model with an adapter in each linear layer of its backbone, which alone is trained, with the whole head.

    There is no dropout in them, as there is none elsewhere: one and the same model must read both answers of a pair.

    Args:
        model: changed in place; the same object is what the result computes with.
        rank: the narrow side of the two matrices.
        alpha: their product counts alpha / rank times.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError(MISSING) from None
    backbone = model.base_model
    layers = [name for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    heads = [
        name for name, part in model.named_children() if part is not backbone and any(True for _ in part.parameters())
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[f"{model.base_model_prefix}.{name}" for name in layers],
        modules_to_save=heads,
    )
    return get_peft_model(model, config)


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights of the model that `add_lora` was given, which is a plain one again."""
    model.merge_and_unload()
