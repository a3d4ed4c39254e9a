"""The reward trainer: trains and evaluates one reward model or control, in a process of its own."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from metaalign_rl.progress import Update, stream
from metaalign_rl.schema import Row, read_rows
from reward.controls import see, training_of, view_of
from reward.score import Mode


class RewardTrainer:
    """A Ray actor round `reward.train` and `reward.evaluate_modes`."""

    def __init__(self, name: str) -> None:
        """`name`: a control's, else any."""
        self._name, self._view = name, view_of(name)
        # transformers would import DeepSpeed, many seconds, to ask whether the model to be saved is one of its own.
        sys.modules["deepspeed"] = None  # type: ignore[assignment]

    def train(self, training: Any, pairs: Sequence[Path], base: Path, output: Path) -> Iterator[Update]:
        """Train on the rows of all `pairs` files, from the checkpoint `base`, and write `output`."""
        import reward

        rows = see([row for path in pairs for row in read_rows(path)], self._view)
        training = training_of(self._name, training)
        return stream(lambda report: reward.train(training, rows, None, base, output, callbacks=[_reporter(report)]))

    def evaluate(self, model: Path, pairs: Sequence[Row], modes: Sequence[Mode]) -> dict[str, dict[str, Any]]:
        """The report of `reward.evaluate` by mode."""
        import reward

        return reward.evaluate_modes(reward.Scorer.from_pretrained(model), see(pairs, self._view), modes)


def _reporter(report: Callable[[Update], None]) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                figures = {name: float(logs[name]) for name in ("loss", "accuracy") if name in logs}
                report(Update(state.global_step, state.max_steps, figures))

    return Reporter()
