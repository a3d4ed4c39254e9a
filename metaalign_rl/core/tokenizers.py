"""Tokenizers: read one, and give it what training needs: the meta-prompt's template and a padding token."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaalign_rl.core.chat_template import MARKERS, TURN_MARKERS, install, require_unchanged
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.template_probe import joints, read_turn, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OTHER_PADDING = ("vision", "image", "video", "audio")  # padding inside pictures and sounds


def read_tokenizer(checkpoint: str | Path, **options: Any) -> Any:
    """The tokenizer of a checkpoint, with any chat template.

    Args:
        options: more arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        UserError: the checkpoint has no tokenizer that transformers can read as a fast one.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(checkpoint)
    if (folder / "tekken.json").is_file():
        if not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"{folder}: expected tokenizer.json, found only tekken.json, which holds no chat template; "
                "download the model's tokenizer.json"
            )
        options["mistral_format"] = False  # else transformers prefers tekken.json
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        fix = "copy tokenizer.json and tokenizer_config.json from the original model"
        raise UserError(f"{checkpoint}: its tokenizer cannot be read ({reason.rstrip(': ')}); {fix}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{checkpoint}: expected a tokenizer with tokenizer.json, found {type(tokenizer).__name__}; "
            "convert it with transformers and save it"
        )
    return tokenizer


def load_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer of a checkpoint that has the meta-prompt's chat template.

    Raises:
        UserError: the chat template is another one, of another version, or was changed since it was installed.
    """
    tokenizer = read_tokenizer(checkpoint)
    require_unchanged(tokenizer)
    return tokenizer


def prepare_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Install the meta-prompt's template, and set a padding token that no text contains.

    Returns:
        What was changed, one sentence per change; empty if the tokenizer was prepared before.

    Raises:
        UserError: see `metaalign_rl.core.chat_template.install`.
    """
    changes, before = [], tokenizer.chat_template
    if before is None:
        changes += _add_own_tokens(tokenizer)
    install(tokenizer)
    if tokenizer.chat_template != before:
        changes.append(
            "installed the meta-prompt's chat template"
            + (" in the project's own format" if before is None else " around the model's own")
        )
    if padding := _new_padding(tokenizer):
        changes.append(f"padding token: {padding}, which no text contains (was {tokenizer.pad_token})")
        tokenizer.add_special_tokens({"pad_token": padding})
        install(tokenizer)  # its literals include all special tokens
    return changes


def prepare_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Give a model a row for each of the tokenizer's tokens, and set its padding token.

    A language model also stops at the end of a turn. See `prepare_tokenizer` for what is returned.
    """
    changes = []
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        _add_rows(model, len(tokenizer))
        changes.append(f"embeddings: {len(tokenizer)} rows (was {rows}); the new ones are the mean of the others")
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None and model.can_generate():
        generation.pad_token_id = tokenizer.pad_token_id
        ends = _as_list(generation.eos_token_id)
        end = read_turn(tokenizer).end
        if (end_id := tokenizer.convert_tokens_to_ids(end)) not in ends:
            generation.eos_token_id = [end_id, *ends]
            changes.append(f"generation stops at {end}, which ends a turn")
    return changes


def end_ids(tokenizer: "PreTrainedTokenizerBase", generation_config: Any = None) -> list[int]:
    """The tokens that end a response: the end of a turn, the end token, and those of a model's generation config."""
    ids = [tokenizer.convert_tokens_to_ids(read_turn(tokenizer).end), *_as_list(tokenizer.eos_token_id)]
    return list(dict.fromkeys([*ids, *_as_list(getattr(generation_config, "eos_token_id", None))]))


def without_added_tokens(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make the tokenizer add no tokens to a text: the chat template writes the first token itself.

    Other programs tokenise a rendered text with the tokenizer's defaults, and would read two such tokens.
    """
    for name in ("add_bos_token", "add_eos_token"):
        if getattr(tokenizer, name, False):
            setattr(tokenizer, name, False)
    if len(tokenizer("x")["input_ids"]) != len(tokenizer("x", add_special_tokens=False)["input_ids"]):
        from tokenizers.processors import Sequence

        tokenizer.backend_tokenizer.post_processor = Sequence([])


def _add_own_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Add the tokens of the project's own format that are missing."""
    changes = []
    known = special_tokens(tokenizer)
    missing = [token for token in (*MARKERS.values(), *TURN_MARKERS) if token not in known]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
        changes.append(f"special tokens: added {', '.join(missing)}, because the model has no chat template")
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": "<eos>"})
        changes.append("end token: added <eos>")
    return changes


def _new_padding(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A token to pad with, if the tokenizer's own is missing or occurs in texts.

    transformers reads a reward model's score at the last token that is not padding.
    """
    written = "".join(joints(tokenizer, str(tokenizer.chat_template)))
    taken = {token for token in special_tokens(tokenizer) if token in written} | {tokenizer.eos_token}
    if tokenizer.pad_token is not None and tokenizer.pad_token not in taken:
        return None
    free = sorted(special_tokens(tokenizer) - taken)
    named = [t for t in free if "pad" in t.lower() and not any(kind in t.lower() for kind in _OTHER_PADDING)]
    return next(iter([*named, *(token for token in free if token == "<|endoftext|>")]), "<pad>")


def _add_rows(model: "PreTrainedModel", rows: int) -> None:
    import torch

    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[before:] = layer.weight[:before].mean(0)


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
