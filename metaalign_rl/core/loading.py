"""Whether transformers can load a checkpoint faithfully: with every weight from its files, and none filled at random.

Imports no heavy packages at the top.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from metaalign_rl.core.checkpoints import quantization, require_loadable, tensor_names
from metaalign_rl.core.errors import UserError

Kind = Literal["CausalLM", "SequenceClassification"]

# Marks in names of weights that were saved from a wrapper of the model, with the remedy.
_WRAPPERS = {
    "_orig_mod.": "the model was saved compiled: save model._orig_mod",
    "base_model.model.": "the model was saved with its adapter: call merge_and_unload() and save the result",
    "_fsdp_wrapped_module.": "the model was saved sharded: save its full state dict",
    "module.": "the model was saved inside of a wrapper: save model.module",
}

# transformers leaves these tensors of old checkpoints out, and does not report them.
_SILENTLY_UNUSED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


def require_servable(folder: Path) -> None:
    """Refuse a checkpoint that vLLM could not load faithfully. Quantized weights are for vLLM to check.

    Raises:
        UserError: see `require_loadable` and `require_complete`.
    """
    require_loadable(folder, may_be_quantized=True)
    if not quantization(folder):
        require_complete(folder)


def require_complete(folder: Path, kind: Kind = "CausalLM") -> set[str]:
    """Compare names and shapes of a checkpoint's tensors with those of its model, without reading the tensors.

    Args:
        kind: "CausalLM" for a language model, "SequenceClassification" for a reward model.

    Returns:
        The names of tensors that the model does not use.

    Raises:
        UserError: see `require_loaded`; or transformers does not have the architecture.
    """
    import transformers

    auto = getattr(transformers, f"AutoModelFor{kind}")
    with quiet_loading():
        try:
            model, loading = auto.from_pretrained(
                folder,
                device_map="meta",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # `require_loaded` refuses them
                output_loading_info=True,
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{folder}: cannot be loaded ({reason}); give another checkpoint") from None
    require_loaded(folder, model, loading)
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), *_SILENTLY_UNUSED]
    unused = {name for name in tensor_names(folder) if any(re.search(pattern, name) for pattern in patterns)}
    return unused.difference(model.state_dict()) | set(loading["unexpected_keys"])


def require_loaded(place: object, model: Any, loading: dict[str, Any], *, new_head: bool = False) -> None:
    """Refuse a model whose weights did not all come from its checkpoint: transformers fills the others at random.

    Args:
        place: the checkpoint, for the error.
        loading: what `from_pretrained(…, ignore_mismatched_sizes=True, output_loading_info=True)` returned.
        new_head: weights outside of the backbone, and a pooler, may be new.

    Raises:
        UserError: names the first weight that is missing or has another shape, and the likely cause.
    """

    def is_needed(name: str) -> bool:
        return not new_head or (name.startswith(f"{model.base_model_prefix}.") and "pooler." not in name)

    for name, found, expected in sorted(loading["mismatched_keys"]):
        if is_needed(name):
            raise UserError(
                f"{place}: expected the weight {name} with the shape {tuple(expected)}, as config.json says, found "
                f"{tuple(found)}; config.json and the weights do not belong together, so save the model again with "
                "save_pretrained()"
            )
    missing = sorted(filter(is_needed, loading["missing_keys"]))
    if missing:
        others = sorted(loading["unexpected_keys"])
        cause = next((cause for mark, cause in _WRAPPERS.items() if any(mark in name for name in others)), "")
        instead = f" (but others, such as {others[0]})" if others else ""
        raise UserError(
            f"{place}: expected all weights of {type(model).__name__}, found none for {len(missing)}, such as "
            f"{missing[0]}{instead}; {cause or 'the checkpoint is incomplete: copy or save it again'}"
        )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide transformers' progress bars and its report of missing weights, which `require_loaded` replaces."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
