"""Makes any language model a valid start: installs the meta-prompt's template and sets its special tokens."""

import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from metaalign_rl.core.chat_template import META_PROMPT_VERSION, is_installed
from metaalign_rl.core.checkpoints import (
    INDEX,
    WEIGHTS,
    drop_own_code,
    find_policy,
    local_checkpoint,
    quantization,
    read_config,
    refuse_pointer,
    weight_files,
)
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json, replace_folder, write_json
from metaalign_rl.core.loading import quiet_loading, require_complete, require_loaded
from metaalign_rl.core.template_probe import read_turn
from metaalign_rl.core.tokenizers import end_ids, prepare_model, prepare_tokenizer, read_tokenizer


def prepare_checkpoint(source: str, folder: Path, *, may_be_quantized: bool = False) -> list[str]:
    """Write a prepared copy of a language model to `folder`, with its weights unchanged.

    Args:
        source: a folder, a GGUF file or a model on the Hugging Face hub. Nothing in it is changed.
        may_be_quantized: the model is only served, not trained.

    Returns:
        What was changed, one sentence per change.

    Raises:
        UserError: the model cannot be loaded, or its chat template cannot hold the tiers.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and not path.is_dir():
        _require_gguf(path)
        changes = _convert(path.parent, folder, gguf_file=path.name, **_as_plain_weights())
        return [f"weights: {read_config(folder)['dtype']}, from the GGUF file's blocks", *changes]
    checkpoint = local_checkpoint(source, may_be_quantized=may_be_quantized)
    tokenizer = read_tokenizer(checkpoint)
    changes = prepare_tokenizer(tokenizer)
    if len(tokenizer) > _vocabulary(checkpoint):
        return _convert(checkpoint, folder)
    if not quantization(checkpoint) and require_complete(checkpoint):
        return _convert(checkpoint, folder)  # without the tensors that the model does not use
    tokenizer.init_kwargs.pop("auto_map", None)  # names code that is never run

    def fill(target: Path) -> None:
        weights = weight_files(checkpoint)
        for file in weights if weights == [checkpoint / WEIGHTS] else [*weights, checkpoint / INDEX]:
            shutil.copyfile(file, target / file.name)
        tokenizer.save_pretrained(target)
        changes.extend(_write_configs(checkpoint, target, tokenizer))

    replace_folder(folder, fill)
    return changes


def prepared_policy(path: Path) -> Path:
    """The checkpoint of a policy, as `find_policy` finds it, or a prepared copy if it is not prepared.

    The copy is in the user's cache folder and is used again next time.

    Raises:
        UserError: see `find_policy` and `prepare_checkpoint`.
    """
    checkpoint = find_policy(path)
    if is_installed(checkpoint):
        return checkpoint
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(checkpoint.iterdir())]
    key = sha256(repr((META_PROMPT_VERSION, str(checkpoint), state)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "metaalign-rl" / "prepared"
    folder = cache / f"{checkpoint.name}-{key}"
    if not folder.is_dir():
        print(f"{path} is not prepared; prepared copy: {folder}")
        changes = prepare_checkpoint(str(checkpoint), folder, may_be_quantized=True)
        print(*(f"- {change}" for change in changes), sep="\n")
    return folder


def _convert(place: Path, folder: Path, **options: Any) -> list[str]:
    """As `prepare_checkpoint`, with the model loaded: it gets more embeddings, or another format."""
    from transformers import AutoModelForCausalLM

    name = place / options.get("gguf_file", "")
    try:
        with quiet_loading():
            model, loading = AutoModelForCausalLM.from_pretrained(
                place,
                use_safetensors=not options,
                trust_remote_code=False,
                dtype="auto",
                ignore_mismatched_sizes=True,  # `require_loaded` refuses them
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{name}: cannot be loaded: {str(error).strip().partition(chr(10))[0]}") from None
    require_loaded(name, model, loading)
    tokenizer = read_tokenizer(place, **({"gguf_file": file} if (file := options.get("gguf_file")) else {}))
    drop_own_code(model, tokenizer)
    changes = [*prepare_tokenizer(tokenizer), *prepare_model(model, tokenizer)]

    def fill(target: Path) -> None:
        with quiet_loading():
            model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    replace_folder(folder, fill)
    return changes


def _require_gguf(file: Path) -> None:
    """Check that the file can be read and has all of its tensors.

    Raises:
        UserError: there is no such file, it is damaged, or Git LFS has not fetched it.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; give the path of a GGUF file")
    refuse_pointer(file)
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{file}: reading GGUF files needs the package gguf; install metaalign-rl[train]") from None
    try:
        GGUFReader(file)
    except Exception as error:  # the reader has no error of its own
        raise UserError(
            f"{file}: expected a complete GGUF file, found a damaged one ({error}); download it again"
        ) from None


def _as_plain_weights() -> dict[str, Any]:
    """Arguments of `from_pretrained` for a GGUF file. Newer transformers keep its blocks unless told not to."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _vocabulary(checkpoint: Path) -> int:
    from transformers import AutoConfig

    size: int = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False).get_text_config().vocab_size
    return size


def _write_configs(checkpoint: Path, target: Path, tokenizer: Any) -> list[str]:
    """Write the configs as `prepare_model` sets them."""
    config = read_json(checkpoint / "config.json")
    config.pop("auto_map", None)  # names code that is never run
    for values in (config, config.get("text_config")):
        if values is not None:
            values["pad_token_id"] = tokenizer.pad_token_id
    file = checkpoint / "generation_config.json"
    generation: dict[str, Any] = read_json(file) if file.is_file() else {}
    before = generation.get("eos_token_id", config.get("eos_token_id"))
    known = [] if before is None else before if isinstance(before, list) else [before]
    ends = end_ids(tokenizer)
    generation["eos_token_id"] = [*ends[:1], *(end for end in known if end not in ends[:1])]
    generation["pad_token_id"] = tokenizer.pad_token_id
    write_json(target / "config.json", config)
    write_json(target / "generation_config.json", generation)
    return [] if ends[0] in known else [f"generation stops at {read_turn(tokenizer).end}, which ends a turn"]
