"""PPO's checkpoints: the newest few and the best. Each folder is written atomically."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from metaalign_rl.core.files import read_json, remove_folder, replace_folder, sweep, write_json

STATE = "controller.json"


class Checkpoint(NamedTuple):
    """One saved checkpoint.

    Attributes:
        state: the trainer's "step", "kl_coef" and "gold": the mean share of rollouts that passed their checks since the
            previous checkpoint, or None; and "mismatch_baseline", see `MismatchGuard`.
        learners: folder of the learners' state.
        policy: folder of the policy, in the Hugging Face format.
    """

    state: dict[str, Any]
    learners: Path
    policy: Path


class Checkpoints:
    """A run's checkpoint folders, `step-N`.

    Args:
        keep: number of newest checkpoints to keep. The one with the highest gold is kept too.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def save(self, state: dict[str, Any], save_learners: Callable[[Checkpoint], object]) -> None:
        """Write the checkpoint of `state["step"]`, and remove those that need not be kept."""

        def fill(folder: Path) -> None:
            save_learners(Checkpoint(state, folder / "learners", folder / "policy"))
            write_json(folder / STATE, state)

        replace_folder(self.folder / f"step-{state['step']}", fill)
        best, found = self.best(), self._folders()
        kept = {*sorted(found)[-self._keep :], *([best.state["step"]] if best else [])}
        for step in found.keys() - kept:
            remove_folder(found[step])
        sweep(self.folder, "step-*")  # leftovers of processes that died while writing or removing

    def last(self) -> Checkpoint | None:
        """The newest checkpoint, if any."""
        found = self._folders()
        return _read(found[max(found)]) if found else None

    def best(self) -> Checkpoint | None:
        """The checkpoint with the highest gold, the newest of equals; None if gold is unknown."""
        known = [one for one in map(_read, self._folders().values()) if one.state["gold"] is not None]
        return max(known, key=lambda one: (one.state["gold"], one.state["step"]), default=None)

    def _folders(self) -> dict[int, Path]:
        return {int(folder.name.removeprefix("step-")): folder for folder in self.folder.glob("step-*")}


def _read(folder: Path) -> Checkpoint:
    return Checkpoint(read_json(folder / STATE), folder / "learners", folder / "policy")
