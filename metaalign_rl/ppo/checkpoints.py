"""PPO's checkpoints: the newest few and the best, each a folder that is whole or not there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaalign_rl.files import read_json, remove_folder, replace_folder, write_json

STATE = "controller.json"


class Checkpoints:
    """The folders `step-N` of a run, and `best.json`, which names one of them.

    Args:
        keep: how many of the newest stay; the best one stays too.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def save(self, state: dict[str, Any], gold: float | None, save_learners: Callable[[Path], object]) -> None:
        """Write the checkpoint of `state["step"]`, and remove what need not be kept.

        Args:
            gold: following by the rows' checks since the checkpoint before; the highest is the best. None: unknown.
        """
        step = state["step"]

        def fill(folder: Path) -> None:
            save_learners(folder / "learners")
            write_json(folder / STATE, state)

        replace_folder(self.folder / f"step-{step}", fill)
        best = self.best()
        if gold is not None and (best is None or gold > best["gold"]):
            best = {"step": step, "gold": gold}
            write_json(self.folder / "best.json", best)
        found = self._steps()
        kept = {*sorted(found)[-self._keep :], *([best["step"]] if best else [])}
        for other in found.keys() - kept:
            remove_folder(found[other])

    def last(self) -> tuple[dict[str, Any], Path] | None:
        """The newest checkpoint's state and its learners' folder, if there is one."""
        found = self._steps()
        if not found:
            return None
        newest = found[max(found)]
        return read_json(newest / STATE), newest / "learners"

    def best(self) -> dict[str, Any] | None:
        """The step and gold of the best checkpoint, if it is known."""
        path = self.folder / "best.json"
        found: dict[str, Any] | None = read_json(path) if path.is_file() else None
        return found if found and (self.folder / f"step-{found['step']}").is_dir() else None

    def _steps(self) -> dict[int, Path]:
        return {int(folder.name.removeprefix("step-")): folder for folder in self.folder.glob("step-*")}
