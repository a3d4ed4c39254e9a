"""The folder of a training's checkpoints: which training it belongs to, and where to resume."""

from pathlib import Path
from typing import Any

from metaalign_rl.core import renamed_settings
from metaalign_rl.core.checkpoints import newest_trainer_checkpoint
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json, write_json


def claim_checkpoint_folder(folder: Path, identity: dict[str, Any]) -> str | None:
    """Mark the folder as this training's, or find the checkpoint to resume from.

    Args:
        identity: what must not change between a training and its resumption, as JSON values.

    Returns:
        The newest complete checkpoint's path; None if there is none.

    Raises:
        UserError: the folder has checkpoints of a training with another identity.
    """
    path = folder / "identity.json"
    newest = newest_trainer_checkpoint(folder)
    if newest is None:
        write_json(path, identity)
        return None
    saved = read_json(path)
    saved["config"] = renamed_settings.current(saved["config"], section="reward")
    changed = [name for name, value in saved.items() if identity[name] != value]
    if changed:
        raise UserError(
            f"{folder}: expected this training's checkpoints, found another training's: "
            f"{' and '.join(changed)} differ; remove the folder to start from scratch, or restore the earlier values"
        )
    return str(newest)
