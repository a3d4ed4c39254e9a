"""Which training a folder of checkpoints belongs to, and where it goes on."""

from pathlib import Path
from typing import Any

from metaalign_rl.core import renamed_settings
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json, write_json


def claim(folder: Path, identity: dict[str, Any]) -> str | None:
    """Make the folder of checkpoints this training's own; the checkpoint to go on from, if there is one.

    Raises:
        UserError: it holds checkpoints of a training of another identity.
    """
    path = folder / "identity.json"
    # The Trainer writes its state last: a checkpoint without it was cut short.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    if whole:
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
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None
