"""Model folders in Hugging Face's format: find one, check that it is safe to load, read its tensors.

Imports no heavy packages at the top.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json

if TYPE_CHECKING:
    from torch import Tensor


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

    Raises:
        UserError: there is no checkpoint in either place.
    """
    for folder in (path / "policy", path):
        if is_checkpoint(folder):
            return folder.absolute()
    raise UserError(
        f"{path}: expected a run's folder with a policy, or a checkpoint's folder, found no config.json; check the path"
    )


def find_policy(path: Path) -> Path:
    """As `find_checkpoint`, for language models only.

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

    The Trainer writes `trainer_state.json` last. A checkpoint without this file is incomplete.
    """
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def require_loadable(folder: Path) -> None:
    """Refuse a folder that is no checkpoint or is not safe to load.

    Raises:
        UserError: the folder or its `config.json` is missing, it has no safetensors, or see `refuse_own_code`.
    """
    _require_folder(folder)
    if not is_checkpoint(folder):
        raise UserError(
            f"{folder}: expected a checkpoint, found no config.json; give the folder of a Hugging Face checkpoint"
        )
    refuse_own_code(folder)
    weight_files(folder)


def refuse_own_code(checkpoint: Path) -> None:
    """Refuse a checkpoint whose config, or its tokenizer's or processor's, asks to run code from the checkpoint.

    Raises:
        UserError: names the config file.
    """
    for file in sorted(checkpoint.glob("*config.json")):
        if "auto_map" in read_json(file):
            raise UserError(
                f"{file}: 'auto_map' asks to run code from the checkpoint, which is never done; "
                "convert the checkpoint to an architecture that transformers has"
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted by name.

    Raises:
        UserError: there is no such folder, or it has no such file.
    """
    _require_folder(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder}: expected *.safetensors weights, found none; other formats can run code and are not loaded, so "
            "save the model with save_pretrained()"
        )
    return files


def tensor_names(folder: Path) -> set[str]:
    """The names of all tensors in a model folder.

    Raises:
        UserError: see `weight_files`.
    """
    from safetensors import safe_open

    names: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return names


def trained_tensor_names(folder: Path) -> set[str]:
    """The names of the tensors that an update of the model has: without an output layer that is tied to the embedding.

    Some checkpoints store such a layer all the same.

    Raises:
        UserError: see `weight_files`.
    """
    from transformers import AutoConfig

    names = tensor_names(folder)
    if AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().tie_word_embeddings:
        return {name for name in names if not name.endswith("lm_head.weight")}
    return names


def tensors_of(folder: Path) -> "Iterator[tuple[str, Tensor]]":
    """Name and value of each tensor in a model folder, on the CPU, read one at a time.

    Raises:
        UserError: see `weight_files`.
    """
    from safetensors import safe_open

    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                yield name, tensors.get_tensor(name)


def disable_dropout(config: Any) -> None:
    """Set every dropout probability in a transformers config to 0, in place."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; give the folder of a Hugging Face checkpoint")
