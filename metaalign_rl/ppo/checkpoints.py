"""PPO's checkpoints: the newest few and the best, each a folder that is whole or not there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from metaalign_rl.core.files import read_json, remove_folder, replace_folder, sweep, write_json

STATE = "controller.json"


class Checkpoint(NamedTuple):
    """One that is there.

    Attributes:
        state: the controller's: "step", "kl_coef", and "gold", following by the rows' checks since the checkpoint
            before, or None.
        learners: the folder of their state.
        policy: the folder of the policy, as transformers loads it.
    """

    state: dict[str, Any]
    learners: Path
    policy: Path


class Checkpoints:
    """The folders `step-N` of a run.

    Args:
        keep: how many of the newest stay; the one with the highest gold stays too.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def save(self, state: dict[str, Any], save_learners: Callable[[Checkpoint], object]) -> None:
        """Write the checkpoint of `state["step"]`, and remove what need not be kept."""

        def fill(folder: Path) -> None:
            save_learners(Checkpoint(state, folder / "learners", folder / "policy"))
            write_json(folder / STATE, state)

        replace_folder(self.folder / f"step-{state['step']}", fill)
        best, found = self.best(), self._folders()
        kept = {*sorted(found)[-self._keep :], *([best.state["step"]] if best else [])}
        for step in found.keys() - kept:
            remove_folder(found[step])
        sweep(self.folder, "step-*")  # what died in the middle of this

    def last(self) -> Checkpoint | None:
        """The newest, if there is one."""
        found = self._folders()
        return _read(found[max(found)]) if found else None

    def best(self) -> Checkpoint | None:
        """The one with the highest gold, of equals the newest; None where gold is not known."""
        known = [one for one in map(_read, self._folders().values()) if one.state["gold"] is not None]
        return max(known, key=lambda one: (one.state["gold"], one.state["step"]), default=None)

    def _folders(self) -> dict[int, Path]:
        return {int(folder.name.removeprefix("step-")): folder for folder in self.folder.glob("step-*")}


def _read(folder: Path) -> Checkpoint:
    return Checkpoint(read_json(folder / STATE), folder / "learners", folder / "policy")
