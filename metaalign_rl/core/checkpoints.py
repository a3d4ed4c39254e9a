"""Model folders: what they hold, and which of them are safe to load. Imports no heavy packages."""

from pathlib import Path

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json


def is_reward_model(checkpoint: Path) -> bool:
    """Whether a checkpoint's folder holds a classifier, which scores, and no language model."""
    architectures = read_json(checkpoint / "config.json").get("architectures") or []
    return any("SequenceClassification" in name for name in architectures)


def refuse_own_code(checkpoint: Path) -> None:
    """Refuse a checkpoint whose config asks to run code that comes with it.

    Raises:
        UserError: it does; names the file.
    """
    config = checkpoint / "config.json"
    if "auto_map" in read_json(config):
        raise UserError(
            f"{config}: 'auto_map' asks to run code from the checkpoint; only models that transformers knows are loaded"
        )


def find_policy(path: Path) -> Path:
    """As `find_checkpoint`, for a language model.

    Raises:
        UserError: there is none, or only a reward model.
    """
    found = find_checkpoint(path)
    if is_reward_model(found):
        raise UserError(
            f"{path}: a reward model, which scores and does not answer; give its run's folder, or a policy's"
        )
    return found


def find_checkpoint(path: Path) -> Path:
    """The checkpoint in a folder: the policy of a run, or the folder itself.

    Raises:
        UserError: there is none.
    """
    for found in (path / "policy", path):
        if (found / "config.json").is_file():
            return found.absolute()
    raise UserError(f"{path}: expected a run's folder that holds a policy, or a checkpoint's folder")
