"""PPO's checkpoints: the newest few and the best. Each folder is written atomically."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from metaalign_rl.core.files import read_json, remove_folder, replace_folder, sweep, write_json

STATE = "controller.json"
RESULTS = ("held_out", "gold")  # of a checkpoint's state; the first one that is known decides which is best


class Checkpoint(NamedTuple):
    """One saved checkpoint.

    Attributes:
        state: the trainer's "step", "kl_coef", "gold": the mean share of rollouts that passed their checks since the
            previous checkpoint, or None; "held_out": the result of the evaluation on held-out prompts after this step,
            or None; and "mismatch_baseline", see `MismatchGuard`.
        learners: folder of the learners' state.
        policy: folder of the policy, in the Hugging Face format.
    """

    state: dict[str, Any]
    learners: Path
    policy: Path


class Checkpoints:
    """A run's checkpoint folders, `step-N`.

    Args:
        keep: number of newest checkpoints to keep. The best one is kept too.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def save(self, state: dict[str, Any], save_learners: Callable[[Checkpoint], object]) -> None:
        """Write the checkpoint of `state["step"]`, and remove those that are not kept."""

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
        """The checkpoint with the best result, the newest of equals; None if no checkpoint has a result.

        The result is `held_out`. If no checkpoint has it, it is `gold`.
        """
        found = [_read(folder) for folder in self._folders().values()]
        for result in RESULTS:
            known = [one for one in found if one.state.get(result) is not None]
            if known:
                return max(known, key=lambda one: (one.state[result], one.state["step"]))
        return None

    def _folders(self) -> dict[int, Path]:
        return {int(folder.name.removeprefix("step-")): folder for folder in self.folder.glob("step-*")}


def _read(folder: Path) -> Checkpoint:
    return Checkpoint(read_json(folder / STATE), folder / "learners", folder / "policy")
