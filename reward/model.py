"""The reward model as a plain Hugging Face checkpoint: build, load, save and export it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from metaalign_rl.core.checkpoints import disable_dropout, drop_own_code, local_checkpoint, read_config
from metaalign_rl.core.dataflow import LABELS
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import replace_folder
from metaalign_rl.core.loading import quiet_loading, require_loaded
from metaalign_rl.core.meta_prompt import META_PROMPT_VERSION
from metaalign_rl.core.tokenizers import (
    load_tokenizer,
    prepare_model,
    prepare_tokenizer,
    read_tokenizer,
    without_added_tokens,
)


def build(base: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build a reward model, not yet trained, from any checkpoint, such as the SFT model's.

    The model is in float32 and has no dropout. A base that already is such a reward model keeps its head.

    The tokenizer gets the meta-prompt's chat template and a padding token that no text contains. transformers reads
    the score at the last token that is not padding, so a token of the text must not count as padding.

    Raises:
        UserError: see `local_checkpoint`, transformers cannot load the model as a sequence classifier, or weights of
            its backbone are not in the checkpoint.
    """
    folder = local_checkpoint(base)
    with quiet_loading(), _loading(folder):
        tokenizer = read_tokenizer(folder)
        config = AutoConfig.from_pretrained(
            folder,
            num_labels=len(LABELS),
            id2label=dict(enumerate(LABELS)),
            label2id={label: index for index, label in enumerate(LABELS)},
            problem_type="multi_label_classification",  # without it vLLM applies a softmax across the labels
        )
        disable_dropout(config)  # the same model must read both answers of a pair
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # the base may have a head of another size
            output_loading_info=True,
        )
    require_loaded(folder, model, loading, new_head=True)
    drop_own_code(model, tokenizer)
    prepare_tokenizer(tokenizer)
    prepare_model(model, tokenizer)
    tokenizer.padding_side = "right"
    without_added_tokens(tokenizer)
    model.config.use_cache = False  # nothing is generated
    model.config.metaalign = {
        "meta_prompt_version": META_PROMPT_VERSION,
        "temperature": dict.fromkeys(LABELS, 1.0),
    }
    return model, tokenizer


def load(
    path: str | Path, device: str | torch.device, dtype: str | torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a saved reward model in evaluation mode.

    Args:
        dtype: the type of the weights; None keeps the checkpoint's.

    Raises:
        UserError: see `local_checkpoint`, or the checkpoint is not a reward model, is one for another version of the
            meta-prompt, or lacks weights.
    """
    folder = local_checkpoint(path)
    config = read_config(folder)
    labels = list(config.get("id2label", {}).values())
    if labels != list(LABELS) or "metaalign" not in config:
        raise UserError(
            f"{folder}: not a reward model with the labels {', '.join(LABELS)} "
            f"(found {', '.join(labels) or 'none'}); make one with `metaalign-reward train`"
        )
    version = config["metaalign"]["meta_prompt_version"]
    if version != META_PROMPT_VERSION:
        raise UserError(
            f"{folder}: expected a model trained on version {META_PROMPT_VERSION} of the meta-prompt, found version "
            f"{version}; train it again"
        )
    with quiet_loading(), _loading(folder):
        tokenizer = load_tokenizer(folder)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # `require_loaded` refuses them
            output_loading_info=True,
        )
    require_loaded(folder, model, loading)
    return model.to(device).eval(), tokenizer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), config, tokenizer and chat template into `folder`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def require_empty(output: Path) -> None:
    """Raise a `UserError` if the output folder exists and is not empty."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise UserError(f"{output}: expected a new or empty folder, it exists already; remove it or choose another")


def head(model: PreTrainedModel) -> nn.Linear:
    """The last linear layer, whose outputs are the scores. Decoders name it `score`, encoders name it differently."""
    backbone = set(model.base_model.modules())
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m not in backbone]
    assert layers, "the model has no linear head"
    assert layers[-1].out_features == model.config.num_labels
    return layers[-1]


def scores_every_token(model: PreTrainedModel) -> bool:
    """Whether the head scores every token, as in transformers' decoders; an encoder's scores one vector per text."""
    return hasattr(model, "score")


def fold_temperatures(model: PreTrainedModel, temperatures: dict[str, float]) -> None:
    """Divide each label's logit by its temperature: scale the head's rows, and record the temperature in the config.

    The plain checkpoint then gives calibrated scores in transformers and vLLM too. Temperatures folded earlier are
    multiplied with the new ones.
    """
    scale = torch.tensor([1 / temperatures[label] for label in LABELS])
    layer = head(model)
    with torch.no_grad():
        layer.weight.mul_(scale.to(layer.weight)[:, None])
        if layer.bias is not None:
            layer.bias.mul_(scale.to(layer.bias))
    known: dict[str, Any] = model.config.metaalign
    folded = {label: known["temperature"][label] * temperatures[label] for label in LABELS}
    model.config.metaalign = {**known, "temperature": folded}


def export_scalar(source: str | Path, output: str | Path) -> None:
    """Export a classifier with the single label `overall`, the form that TRL, RewardBench and OpenRLHF load.

    Raises:
        UserError: see `load`, or `output` exists and is not empty.
    """
    output = Path(output)
    require_empty(output)
    model, tokenizer = load(source, "cpu", None)
    layer, row = head(model), LABELS.index("overall")
    layer.weight = nn.Parameter(layer.weight[row : row + 1].detach().clone())
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[row : row + 1].detach().clone())
    layer.out_features = 1
    model.config.id2label, model.config.label2id = {0: "overall"}, {"overall": 0}
    model.config.problem_type = "regression"  # without an activation: readers get the logit
    replace_folder(output, lambda folder: save(model, tokenizer, folder))


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: cannot be loaded as a reward model ({reason})") from None
