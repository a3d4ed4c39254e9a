"""The reward trainer: trains and evaluates one reward model or control, in a process of its own."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from metaalign_rl.progress import Update, stream
from metaalign_rl.schema import Row, read_rows
from reward.score import Mode

View = Literal["whole", "preference_blind", "tier_blind"]  # what of a row's meta-prompt the model sees


class RewardTrainer:
    """A Ray actor round `reward.train` and `reward.evaluate`."""

    def __init__(self, view: View) -> None:
        self._view = view
        # transformers would import DeepSpeed, many seconds, to ask whether the model to be saved is one of its own.
        sys.modules["deepspeed"] = None  # type: ignore[assignment]

    def train(self, training: Any, pairs: Sequence[Path], base: Path, output: Path) -> Iterator[Update]:
        """Train on the rows of all `pairs` files, from the checkpoint `base`, and write `output`."""
        import reward

        rows = [row for path in pairs for row in read_rows(path)]
        return stream(
            lambda report: reward.train(training, self._see(rows), None, base, output, callbacks=[_reporter(report)])
        )

    def evaluate(self, model: Path, pairs: Sequence[Row], modes: Sequence[Mode]) -> dict[str, dict[str, Any]]:
        """The report of `reward.evaluate` by mode."""
        import reward

        scorer, rows = reward.Scorer.from_pretrained(model), self._see(pairs)
        return {mode: reward.evaluate(scorer, rows, mode) for mode in modes}

    def _see(self, rows: Sequence[Row]) -> list[Row]:
        from reward import preference_blind, tier_blind

        views: dict[View, Callable[[Sequence[Row]], list[Row]]] = {
            "whole": list,
            "preference_blind": preference_blind,
            "tier_blind": tier_blind,
        }
        return views[self._view](rows)


def _reporter(report: Callable[[Update], None]) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                figures = {name: float(logs[name]) for name in ("loss", "accuracy") if name in logs}
                report(Update(state.global_step, state.max_steps, figures))

    return Reporter()
