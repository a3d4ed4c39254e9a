"""PPO's checkpoints: the newest few and the best, each a folder that is whole or not there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaalign_rl.files import read_json, remove_folder, replace_folder, sweep, write_json

STATE = "controller.json"


class Checkpoints:
    """The folders `step-N` of a run, and `best.json`, which names one of them.

    Each checkpoint holds its own gold, so that a process that dies before it has written `best.json` forgets nothing.

    Args:
        keep: how many of the newest stay; the best one stays too.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def save(self, state: dict[str, Any], save_learners: Callable[[Path], object]) -> None:
        """Write the checkpoint of `state["step"]`, and remove what need not be kept.

        Args:
            state: its `gold` is following by the rows' checks since the checkpoint before; the highest is the best.
                None: unknown.
        """
        step = state["step"]

        def fill(folder: Path) -> None:
            save_learners(folder / "learners")
            write_json(folder / STATE, state)

        replace_folder(self.folder / f"step-{step}", fill)
        if best := self.best():
            write_json(self.folder / "best.json", best)
        found = self._steps()
        kept = {*sorted(found)[-self._keep :], *([best["step"]] if best else [])}
        for other in found.keys() - kept:
            remove_folder(found[other])
        sweep(self.folder, "step-*")  # what died in the middle of this

    def last(self) -> tuple[dict[str, Any], Path] | None:
        """The newest checkpoint's state and its learners' folder, if there is one."""
        found = self._steps()
        if not found:
            return None
        newest = found[max(found)]
        return read_json(newest / STATE), newest / "learners"

    def best(self) -> dict[str, Any] | None:
        """The step and gold of the best checkpoint, the first of equals, if it is known."""
        states = [read_json(folder / STATE) for _, folder in sorted(self._steps().items())]
        known = [{"step": state["step"], "gold": state["gold"]} for state in states if state.get("gold") is not None]
        return max(known, key=lambda state: state["gold"], default=None)

    def _steps(self) -> dict[int, Path]:
        return {int(folder.name.removeprefix("step-")): folder for folder in self.folder.glob("step-*")}
