"""The PPO stage: start the actors and run the loop."""

from functools import partial
from typing import Any

import ray

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Metrics
from metaalign_rl.core.files import write_json
from metaalign_rl.learner.group import LearnerGroup, Models
from metaalign_rl.monitoring.metrics_logger import MetricsLogger, open_metrics_logger
from metaalign_rl.monitoring.rollout_table import RolloutWriter
from metaalign_rl.pipeline.context import RunContext
from metaalign_rl.ppo.advantages import needs_critic
from metaalign_rl.ppo.checkpoints import RESULTS, Checkpoint, Checkpoints
from metaalign_rl.ppo.held_out import HeldOutPrompts
from metaalign_rl.ppo.loop import Actors, PPOTrainer
from metaalign_rl.ppo.prompt_sampler import PromptSource
from metaalign_rl.runtime.actor_calls import HeartbeatDeadline
from metaalign_rl.runtime.actor_options import actor_options
from metaalign_rl.runtime.progress import ProgressBar, ProgressUpdate
from metaalign_rl.scoring.shaping import Shaping
from metaalign_rl.scoring.terms import RewardSpec
from metaalign_rl.scoring.user_function import absolute
from metaalign_rl.scoring.worker import RewardWorker
from metaalign_rl.scoring.worker_pool import RewardPool

SHOWN = ("reward", "gold", "kl")  # next to the progress bar


def run(context: RunContext) -> None:
    """Train `policy/` from the SFT policy; an interrupted run resumes from its last checkpoint."""
    from metaalign_rl.core.tokenizers import load_tokenizer

    config, folder, start = context.config, context.folder, context.start_policy()
    critic = (context.reward_model() or start) if needs_critic(config.ppo.algorithm) else None
    engines = context.engines(start)  # first, because they take longest to load
    if config.shares_gpus:  # vLLM must not measure memory while others load
        engines.settle()
    learners = LearnerGroup(config, Models(policy=start, critic=critic, reference=start))
    actors = Actors(engines, start_scorers(context), learners)
    tokenizer, checkpoints = load_tokenizer(start), folder.checkpoints / "ppo"
    try:
        prompts = PromptSource(config, context.rows("prompts"), tokenizer)
        writer = RolloutWriter(folder.rollouts, config.run.keep_rollouts)
        with ProgressBar("ppo") as bar, open_metrics_logger(config, folder) as logger:
            report = partial(_report, logger, bar, config.ppo.steps)
            pad = tokenizer.pad_token_id
            held_out = held_out_prompts(context, tokenizer)
            trainer = PPOTrainer(config, actors, prompts, pad, checkpoints, writer, context.faults, report, held_out)
            trainer.train(folder.policy)
    finally:
        actors.stop()
    if best := Checkpoints(checkpoints, config.ppo.keep_checkpoints).best():
        record = describe(best)
        write_json(folder.best_checkpoint, record)
        if record["step"] < config.ppo.steps:
            print(f"ppo: best checkpoint, with {record['result']:.3f} {record['of']}: {record['policy']}")


MEANINGS = {
    "held_out": "on held-out prompts (gold, or without checks the reward)",
    "gold": "mean gold on training prompts since the checkpoint before it",
}


def describe(best: Checkpoint) -> dict[str, Any]:
    """What the report says of the best checkpoint: its step, its result and what that is, and the policy's folder."""
    by = next(name for name in RESULTS if best.state.get(name) is not None)
    return {"step": best.state["step"], "result": best.state[by], "of": MEANINGS[by], "policy": str(best.policy)}


def held_out_prompts(context: RunContext, tokenizer: Any) -> HeldOutPrompts | None:
    """The prompts of the evaluation during training; None if it is off or the data has no held-out prompts."""
    config = context.config
    if not config.ppo.evaluate_steps:
        return None
    if not context.folder.rows("held_out_prompts").is_file():
        print("ppo: the data has no held-out prompts, so ppo.evaluate_steps has no effect", flush=True)
        return None
    return HeldOutPrompts(config, context.rows("held_out_prompts"), tokenizer)


def reward_spec(config: Config, scorer: Any) -> RewardSpec:
    """The run's reward. `scorer`: the reward model's folder or a server's URL, or None."""
    return RewardSpec(
        model=scorer,
        mode=config.reward.mode,
        view=config.reward.view,
        dtype=config.model.dtype,
        function=absolute(config.reward.function) if config.reward.function else None,
        model_weight=config.ppo.model_weight,
        checks_weight=config.ppo.checks_weight,
        function_weight=config.ppo.function_weight,
        shaping=shaping(config),
    )


def shaping(config: Config) -> Shaping:
    """The clip and the penalties of the run's reward."""
    ppo = config.ppo
    return Shaping(
        clip=ppo.reward_clip,
        unfinished=ppo.unfinished_penalty if ppo.unfinished == "penalty" else 0.0,
        overlong=ppo.overlong_penalty,
        overlong_tokens=ppo.overlong_tokens,
        max_new_tokens=config.rollout.max_new_tokens,
    )


def start_scorers(context: RunContext) -> RewardPool:
    """Start the reward workers without waiting until their models are loaded."""
    config, limits = context.config, context.config.faults
    spec, actor, count = reward_spec(config, context.scorer()), ray.remote(RewardWorker), config.ppo.reward_workers

    def start(number: int) -> Any:
        return actor.options(**actor_options(config, "reward", count, number)).remote(spec)

    return RewardPool(start, count, context.faults, partial(HeartbeatDeadline, limits.start_s, limits.silence_s))


def _report(logger: MetricsLogger, bar: ProgressBar, steps: int, metrics: Metrics) -> None:
    logger.write(metrics)
    shown = {name: metrics[name] for name in SHOWN if name in metrics}
    bar(ProgressUpdate(int(metrics["step"]), steps, shown))
