"""Which training a folder of checkpoints belongs to, and where it goes on."""

from pathlib import Path
from typing import Any

from metaalign_rl.core import renamed_settings
from metaalign_rl.core.checkpoints import newest_trainer_checkpoint
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json, write_json


def claim(folder: Path, identity: dict[str, Any]) -> str | None:
    """Make the folder of checkpoints this training's own; the checkpoint to go on from, if there is one.

    Raises:
        UserError: it holds checkpoints of a training of another identity.
    """
    path = folder / "identity.json"
    newest = newest_trainer_checkpoint(folder)
    if newest:
        saved = read_json(path)
        saved["config"] = renamed_settings.current(saved["config"], section="reward")
        other = [name for name, value in saved.items() if identity[name] != value]
        if other:
            raise UserError(
                f"{folder}: checkpoints of a training with another {' and '.join(other)}; "
                "remove the folder to start anew, or give what it began with"
            )
    else:
        write_json(path, identity)
    return str(newest) if newest else None
