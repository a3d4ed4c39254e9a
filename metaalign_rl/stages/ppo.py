"""The PPO stage: start the actors, drive the loop, keep its metrics."""

from pathlib import Path
from typing import TYPE_CHECKING

import ray

from metaalign_rl.context import RunContext
from metaalign_rl.files import read_jsonl, write_jsonl
from metaalign_rl.learner.group import LearnerGroup
from metaalign_rl.ppo.controller import Actors, Controller, Metrics
from metaalign_rl.ppo.records import RolloutLog
from metaalign_rl.progress import Bar, Update
from metaalign_rl.reward_worker import RewardWorker
from metaalign_rl.runtime import actor_options

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SHOWN = ("reward", "gold", "kl")  # beside the progress bar


def run(context: RunContext) -> None:
    """Train `policy/` from the SFT policy; an interrupted training goes on from its last checkpoint."""
    from transformers import AutoTokenizer

    config, folder, start = context.config, context.folder, context.start_policy()
    checkpoints = folder.checkpoints / "ppo"
    learners = LearnerGroup(config, policy=start, critic=context.reward_model() or start, reference=start)
    actors = Actors(context.engines(start), start_scorers(context), learners)
    tokenizer, kept = AutoTokenizer.from_pretrained(start), RolloutLog(folder.rollouts, config.run.keep_rollouts)
    controller = Controller(config, actors, context.rows("prompts"), tokenizer, checkpoints, kept)
    learners.wait()
    with Bar("ppo") as bar, MetricsLog(folder.metrics, folder.root / "tensorboard") as log:
        for metrics in controller.steps():
            log.write(metrics)
            bar(Update(controller.step, config.ppo.steps, {name: metrics[name] for name in SHOWN if name in metrics}))
    learners.save_policy(folder.policy)
    learners.stop()
    for scorer in actors.scorers:
        ray.kill(scorer)


def start_scorers(context: RunContext) -> list[ray.actor.ActorHandle]:
    """The reward workers, loading."""
    config = context.config
    count = config.ppo.reward_workers
    actor = ray.remote(RewardWorker)
    arguments = (
        context.scorer(),
        config.reward.mode,
        config.ppo.model_weight,
        config.ppo.checks_weight,
        config.reward.view,
        config.model.dtype,
    )
    options = [actor_options(config, "reward", count, index) for index in range(count)]
    return [actor.options(**option).remote(*arguments) for option in options]


class MetricsLog:
    """One JSON line a step and the same for TensorBoard. A step that is done again after a resume replaces its own."""

    def __init__(self, path: Path, tensorboard: Path) -> None:
        self._path, self._tensorboard = path, tensorboard
        self._lines: list[Metrics] = [line for _, line in read_jsonl(path)] if path.is_file() else []
        self._board: SummaryWriter | None = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, metrics: Metrics) -> None:
        """Append a step's metrics."""
        step = int(metrics["step"])
        self._lines = [line for line in self._lines if line["step"] < step] + [metrics]
        write_jsonl(self._path, self._lines)
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._tensorboard), purge_step=step)  # what came after is done again
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
