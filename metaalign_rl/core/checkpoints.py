"""Model folders in Hugging Face's format: find one, check that it is safe to load, read its tensors.

Imports no heavy packages at the top.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any, NamedTuple

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_POINTER = b"version https://git-lfs"
_PACKED_TYPES = ("U8", "I8", "F8", "F4")  # beginnings of safetensors' names of types
_PACKED_NAMES = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax")


class TensorHeader(NamedTuple):
    """A tensor's type, by safetensors' names such as "BF16", and its shape."""

    dtype: str
    shape: tuple[int, ...]


# The files to download from the Hugging Face hub: no pickles and no code.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a model: it has a `config.json`."""
    return (folder / "config.json").is_file()


def read_config(checkpoint: Path) -> Any:
    """The values in a checkpoint's `config.json`.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    return read_json(checkpoint / "config.json")


def is_reward_model(checkpoint: Path) -> bool:
    """Whether the checkpoint is a sequence classifier, which scores text, and not a language model.

    Raises:
        UserError: see `read_config`.
    """
    architectures = read_config(checkpoint).get("architectures") or []
    return any("SequenceClassification" in name for name in architectures)


def find_checkpoint(path: Path) -> Path:
    """The policy of a run if `path` is a run's folder, else the checkpoint at `path` itself.

    A model on the Hugging Face hub (`owner/name`) is downloaded first.

    Raises:
        UserError: there is no checkpoint in either place, or only an adapter.
    """
    for folder in (path / "policy", path):
        if is_checkpoint(folder):
            return folder.absolute()
    if "/" in str(path) and not path.exists() and is_hub_id(str(path)):
        return local_checkpoint(path)
    _refuse_adapter(path)
    if (gguf := next(iter(sorted(path.glob("*.gguf"))), path)).suffix == ".gguf" and gguf.is_file():
        fix = f"convert {gguf.name} first with `metaalign-rl prepare {gguf} --output DIR`"
    else:
        fix = "check the path"
    raise UserError(
        f"{path}: expected a run's folder with a policy, or a checkpoint's folder, found no config.json; {fix}"
    )


def find_policy(path: Path) -> Path:
    """Like `find_checkpoint`, for language models only.

    Raises:
        UserError: there is no checkpoint, or it is a reward model.
    """
    found = find_checkpoint(path)
    if is_reward_model(found):
        raise UserError(
            f"{path}: expected a policy, found a reward model, which scores responses and writes none; "
            "give a run's folder or a policy's"
        )
    return found


def newest_trainer_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint that transformers' Trainer wrote to `folder`; None without one.

    The Trainer writes `trainer_state.json` last. A checkpoint is incomplete without this file, or with a part of it.
    """
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True


def local_checkpoint(path: str | Path, *, may_be_quantized: bool = False) -> Path:
    """The checkpoint's folder, checked; a model on the Hugging Face hub (`owner/name`) is downloaded first.

    Args:
        may_be_quantized: see `require_loadable`.

    Raises:
        UserError: there is no such folder or model, or see `require_loadable`.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        folder = _fetch(str(path))
    require_loadable(folder, may_be_quantized=may_be_quantized)
    return folder


def is_hub_id(value: str) -> bool:
    """Whether it looks like a hub's `owner/name`. If `owner` is a local folder, it is a mistyped path instead."""
    return bool(_HUB_ID.fullmatch(value)) and value[0] != "." and not Path(value.split("/")[0]).exists()


# What cannot be loaded.


def require_loadable(folder: Path, *, may_be_quantized: bool = False) -> None:
    """Refuse a folder that cannot be loaded safely and faithfully, as far as its files tell without their tensors.

    `metaalign_rl.core.loading.require_complete` also compares the tensors with the model.

    Args:
        may_be_quantized: the model is only served, not trained.

    Raises:
        UserError: there is no such folder on this node, it holds only an adapter, it has no `config.json`, it needs
            code of its own, a file is a Git LFS pointer, is incomplete or is missing, or the weights are quantized.
    """
    _require_folder(folder)
    _refuse_adapter(folder)
    if not is_checkpoint(folder):
        raise UserError(
            f"{folder}: expected a checkpoint, found no config.json; give the folder of a Hugging Face checkpoint"
        )
    _refuse_pointers(folder)
    for file in _files_with_code(folder):
        if not _is_native(file):
            raise _own_code_error(file)
    found = quantization(folder)
    if found and not may_be_quantized:
        raise UserError(
            f"{folder}: expected weights in float32, bfloat16 or float16, found quantized ones ({found}), which cannot "
            "be trained; give the checkpoint that they were made from"
        )


def refuse_pointer(file: Path) -> None:
    """Refuse a file that Git LFS has not fetched.

    Raises:
        UserError: it is a pointer.
    """
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"{file}: expected the file itself, found a Git LFS pointer to it; run `git lfs pull` in its folder"
            )


def refuse_own_code(checkpoint: Path) -> None:
    """Refuse a checkpoint that names code of its own, also if transformers has the architecture.

    For programs that would run that code, such as OpenRLHF.

    Raises:
        UserError: names the config file.
    """
    for file in _files_with_code(checkpoint):
        raise _own_code_error(file)


def drop_own_code(model: Any, tokenizer: Any) -> None:
    """Remove the names of the checkpoint's own code from what will be saved.

    The model was loaded as transformers' own class. Readers of the saved checkpoint must do the same.
    """
    vars(model.config).pop("auto_map", None)
    tokenizer.init_kwargs.pop("auto_map", None)


def require_context(folder: Path, max_tokens: int, name: str = "model.max_tokens") -> None:
    """Refuse a `max_tokens` above the context that the model and its tokenizer state.

    Args:
        name: the setting, for the error.

    Raises:
        UserError: it is above; or a config is no JSON.
    """
    config = read_config(folder)
    stated = {"config.json": (config.get("text_config") or config).get("max_position_embeddings")}
    if (folder / "tokenizer_config.json").is_file():
        stated["tokenizer_config.json"] = read_json(folder / "tokenizer_config.json").get("model_max_length")
    for file, longest in stated.items():
        if longest is not None and max_tokens > longest:
            raise UserError(
                f"{name}: expected at most {longest}, the context that {folder / file} states, found {max_tokens}; "
                f"lower {name}"
            )


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such model folder on this node ({gethostname()}); give the folder of a Hugging Face "
            "checkpoint, on storage that every node sees"
        )


def _refuse_adapter(folder: Path) -> None:
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not is_checkpoint(folder):
        base = read_json(adapter).get("base_model_name_or_path", "its base model")
        raise UserError(
            f"{folder}: expected a model, found only an adapter for {base}; merge it: load both with peft, call "
            "merge_and_unload() and save the result with the tokenizer"
        )


def _refuse_pointers(folder: Path) -> None:
    for file in sorted(folder.glob("*")):
        if file.suffix in (".json", ".safetensors", ".model", ".jinja") and file.is_file():
            refuse_pointer(file)


def _files_with_code(checkpoint: Path) -> list[Path]:
    """The config files that name code in the checkpoint."""
    return [file for file in sorted(checkpoint.glob("*config.json")) if "auto_map" in read_json(file)]


def _own_code_error(file: Path) -> UserError:
    return UserError(
        f"{file}: 'auto_map' asks to run code from the checkpoint, which is never done; "
        "convert the checkpoint to an architecture that transformers has"
    )


def _is_native(file: Path) -> bool:
    """Whether transformers has the architecture or the tokenizer, so that the code that the file names is not needed.

    Authors often publish their code before transformers has the model, and leave its name in the config.
    """
    config = read_json(file)
    if file.name == "config.json":
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        return config.get("model_type") in CONFIG_MAPPING_NAMES
    if file.name == "tokenizer_config.json":
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

        return tokenizer_class_from_name(config.get("tokenizer_class") or "") is not None
    return False


def quantization(folder: Path) -> str:
    """How the weights are quantized, such as "gptq"; empty if they are not.

    Raises:
        UserError: see `tensor_headers`.
    """
    config = read_config(folder)
    for part in (config, config.get("text_config") or {}):
        if given := part.get("quantization_config") or part.get("compression_config"):
            return str(given.get("quant_method", "quantization_config in config.json"))
    for name, tensor in tensor_headers(folder).items():
        packed = name.endswith(".weight") and tensor.dtype.startswith(_PACKED_TYPES)
        if packed or name.endswith(_PACKED_NAMES):
            return f"{name} in {tensor.dtype}"
    return ""


# Tensors.


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: `model.safetensors`, or those of `model.safetensors.index.json`.

    Other safetensors files, such as a `consolidated.safetensors` with the same weights, do not belong to the model.

    Raises:
        UserError: there is no such folder, it has no such file, or a file of the index is missing.
    """
    _require_folder(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        files = [folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]
        for file in files:
            if file.parent != folder:
                raise UserError(f"{folder / INDEX}: expected names of files in its folder, found {str(file)!r}")
            if not file.is_file():
                raise UserError(f"{file}: no such file, but {INDEX} names it; copy or download the checkpoint again")
        return files
    raise UserError(
        f"{folder}: expected {WEIGHTS} or {INDEX}, found neither; other formats can run code and are not loaded, so "
        "save the model with save_pretrained()"
    )


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """Type and shape of each tensor of a model folder, by name. No tensor is read.

    Raises:
        UserError: see `weight_files`; or a file is incomplete or no safetensors file.
    """
    found: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        for name, entry in _header(file).items():
            found[name] = TensorHeader(entry["dtype"], tuple(entry["shape"]))
    return found


def _header(file: Path) -> dict[str, Any]:
    """The JSON at the start of a safetensors file: after its length in 8 bytes, and before the tensors."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 1 < length <= size - 8:
            raise UserError(f"{file}: no safetensors file, or an incomplete one; copy or download it again")
        try:
            entries = json.loads(opened.read(length))
        except ValueError:
            raise UserError(f"{file}: no safetensors file; copy or download it again") from None
    entries.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size < end:
        raise UserError(f"{file}: expected {end:,} bytes, found {size:,}; copy or download it again")
    return dict(entries)


def tensor_names(folder: Path) -> set[str]:
    """The names of all tensors of a model folder.

    Raises:
        UserError: see `tensor_headers`.
    """
    return set(tensor_headers(folder))


def trained_tensor_names(folder: Path) -> set[str]:
    """The names of the tensors that an update of the model has: without an output layer that is tied to the embedding.

    Some checkpoints store such a layer all the same.

    Raises:
        UserError: see `tensor_headers`.
    """
    from transformers import AutoConfig

    names = tensor_names(folder)
    if AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().tie_word_embeddings:
        return {name for name in names if not name.endswith("lm_head.weight")}
    return names


def tensors_of(folder: Path) -> "Iterator[tuple[str, Tensor]]":
    """Name and value of each tensor of a model folder, on the CPU, read one at a time.

    Raises:
        UserError: see `weight_files`.
    """
    from safetensors import safe_open

    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                yield name, tensors.get_tensor(name)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if "/" not in name or not is_hub_id(name):
        raise UserError(f"{name}: no such folder; give a checkpoint's folder, or a model on the hub as owner/name")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name}: expected a folder or a model on the Hugging Face hub, found neither ({reason})"
        ) from None


def disable_dropout(config: Any) -> None:
    """Set every dropout probability in a transformers config to 0, in place."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
