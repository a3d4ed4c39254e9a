"""The PPO stage: start the actors, drive the loop."""

from functools import partial

import ray

from metaalign_rl.learner.group import LearnerGroup, Models
from metaalign_rl.monitoring.metrics_logger import open_metrics_logger
from metaalign_rl.monitoring.rollout_table import RolloutWriter
from metaalign_rl.pipeline.context import RunContext
from metaalign_rl.ppo.advantages import needs_critic
from metaalign_rl.ppo.checkpoints import Checkpoints
from metaalign_rl.ppo.loop import Actors, PPOTrainer
from metaalign_rl.runtime.actor_calls import HeartbeatDeadline
from metaalign_rl.runtime.actor_options import actor_options
from metaalign_rl.runtime.progress import ProgressBar, ProgressUpdate
from metaalign_rl.scoring.user_function import absolute
from metaalign_rl.scoring.worker import RewardWorker
from metaalign_rl.scoring.worker_pool import RewardPool

SHOWN = ("reward", "gold", "kl")  # beside the progress bar


def run(context: RunContext) -> None:
    """Train `policy/` from the SFT policy; an interrupted training goes on from its last checkpoint."""
    from transformers import AutoTokenizer

    config, folder, start = context.config, context.folder, context.start_policy()
    critic = (context.reward_model() or start) if needs_critic(config.ppo.algorithm) else None
    engines = context.engines(start)  # first, since they take longest to load
    learners = LearnerGroup(config, Models(policy=start, critic=critic, reference=start))
    actors = Actors(engines, start_scorers(context), learners)
    tokenizer, kept = AutoTokenizer.from_pretrained(start), RolloutWriter(folder.rollouts, config.run.keep_rollouts)
    rows, checkpoints = context.rows("prompts"), folder.checkpoints / "ppo"
    controller = PPOTrainer(config, actors, rows, tokenizer, checkpoints, kept, context.faults)
    try:
        with ProgressBar("ppo") as bar, open_metrics_logger(config, folder) as log:
            for metrics in controller.steps(folder.policy):
                log.write(metrics)
                shown = {name: metrics[name] for name in SHOWN if name in metrics}
                bar(ProgressUpdate(controller.step, config.ppo.steps, shown))
    finally:
        actors.stop()
    best = Checkpoints(checkpoints, config.ppo.keep_checkpoints).best()
    if best and best.state["step"] < config.ppo.steps:
        print(f"ppo: gold was highest, {best.state['gold']:.3f}, before step {best.state['step']}: {best.policy}")


def start_scorers(context: RunContext) -> RewardPool:
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
        absolute(config.reward.function) if config.reward.function else None,
        config.ppo.function_weight,
    )
    limits = config.faults
    return RewardPool(
        lambda number: actor.options(**actor_options(config, "reward", count, number)).remote(*arguments),
        count,
        context.faults,
        partial(HeartbeatDeadline, limits.start_s, limits.silence_s),
    )
