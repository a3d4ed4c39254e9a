"""The reward trainer: trains and evaluates one reward model or control, on one or more ranks."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.rows import read_rows
from metaalign_rl.core.views import apply_view
from metaalign_rl.runtime import deepspeed_config
from metaalign_rl.runtime.deepspeed_config import ZeroStage
from metaalign_rl.runtime.progress import ProgressUpdate, stream
from metaalign_rl.trainers.callbacks import StopRequest, report_callback
from reward.score import Mode
from reward.training.controls import training_of, view_of


class RewardTrainerActor:
    """One rank of a reward training: a Ray actor wrapping `reward.train` and `reward.evaluate_modes`.

    Call `train` on all ranks of a model with the same arguments.
    """

    def __init__(self, name: str, rank: int = 0, world_size: int = 1, rendezvous: str = "") -> None:
        """Join the other ranks, if there are any; see `deepspeed_setup.prepare`.

        Args:
            name: a control's name selects its view of the rows; with any other name, the rows are unchanged.
        """
        self._name, self._view, self._world_size = name, view_of(name), world_size
        self._stop = StopRequest()
        if world_size > 1:
            from metaalign_rl.runtime import deepspeed_setup

            deepspeed_setup.prepare(rank, world_size, rendezvous)
        else:
            # Otherwise transformers imports it to check the class of a model that it saves. This takes many seconds.
            sys.modules["deepspeed"] = None  # type: ignore[assignment]

    def stop(self) -> None:
        """Make `train` save after its current step and raise `TrainingStopped`."""
        self._stop.set()

    def train(
        self, training: Any, pairs: Sequence[Path], base: Path, output: Path, zero_stage: ZeroStage = 0
    ) -> Iterator[ProgressUpdate]:
        """Train the checkpoint `base` on the rows of all `pairs` files and write the model to `output`.

        Args:
            training: a `RewardTraining`.
            zero_stage: DeepSpeed ZeRO stage, 0 to 2; used with several ranks.

        Raises:
            TrainingStopped: `stop` was called.
        """
        import reward

        rows = apply_view([row for path in pairs for row in read_rows(path)], self._view)
        training = training_of(self._name, training)
        settings = deepspeed_config.for_reward(zero_stage, bf16=training.bf16) if self._world_size > 1 else None
        yield from stream(
            lambda report: reward.train(
                training, rows, None, base, output, [report_callback(report), self._stop.callback()], settings
            )
        )

    def evaluate(
        self, model: Path, pairs: Sequence[Row], modes: Sequence[Mode], dtype: str
    ) -> dict[str, dict[str, Any]]:
        """The report of `reward.evaluate` for each mode for which the model was trained."""
        import reward

        scorer = reward.Scorer.from_pretrained(model, dtype=dtype)
        return reward.evaluate_modes(scorer, apply_view(pairs, self._view), modes, skip_untrained=True)
