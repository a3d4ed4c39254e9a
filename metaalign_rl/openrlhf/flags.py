"""Converts our settings to options of OpenRLHF 0.11's PPO trainer. Imports no heavy packages."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from metaalign_rl.config.schema import Config
from metaalign_rl.core.errors import UserError

# Settings whose values are passed as they are: a number, a word, several values of one option, or a switch.
FLAGS: dict[str, tuple[str, ...]] = {
    "run.seed": ("--train.seed",),
    "model.max_tokens": ("--data.max_len",),
    "rollout.engines": ("--vllm.num_engines",),
    "rollout.tensor_parallel": ("--vllm.tensor_parallel_size",),
    "rollout.gpu_memory_utilization": ("--vllm.gpu_memory_utilization",),
    "rollout.max_new_tokens": ("--rollout.max_new_tokens",),
    "ppo.prompts_per_step": ("--rollout.batch_size",),
    "ppo.samples_per_prompt": ("--rollout.n_samples_per_prompt",),
    "ppo.gamma": ("--algo.advantage.gamma",),
    "ppo.lam": ("--algo.advantage.lambd",),
    "ppo.kl_coef": ("--algo.kl.init_coef",),
    "ppo.save_steps": ("--ckpt.save_steps",),
    "rollout.temperature": ("--rollout.temperature",),
    "rollout.top_p": ("--rollout.top_p",),
    "learner.learning_rate": ("--actor.adam.lr",),
    "learner.critic_learning_rate": ("--critic.adam.lr",),
    "learner.betas": ("--actor.adam.betas", "--critic.adam.betas"),
    "learner.weight_decay": ("--actor.adam.weight_decay", "--critic.adam.weight_decay"),
    "learner.max_grad_norm": ("--actor.max_norm", "--critic.max_norm"),
    "learner.schedule": ("--actor.lr_scheduler", "--critic.lr_scheduler"),
    "learner.epochs": ("--train.max_epochs",),
    "learner.dual_clip": ("--actor.dual_clip",),
    "learner.entropy_coef": ("--actor.entropy_coef",),
    "learner.zero_stage": ("--ds.zero_stage",),
    "learner.offload_optimizer": ("--ds.adam_offload",),
    "learner.gradient_checkpointing": ("--actor.gradient_checkpointing_enable",),
}
# Settings that `flags` converts, or that need no option.
DERIVED = (
    "ppo.algorithm", "ppo.steps", "ppo.sampler", "ppo.model_weight", "ppo.kl", "ppo.kl_target", "ppo.kl_horizon",
    "ppo.kl_estimator", "ppo.kl_in", "learner.clip_low", "learner.clip_high", "learner.value_clip",
    "learner.minibatch_size", "learner.micro_batch_tokens", "learner.warmup_steps", "learner.world_size",
)  # fmt: skip
ESTIMATORS = {"ppo": "gae", "rloo": "rloo", "reinforce++": "reinforce", "grpo": "group_norm"}


@dataclass(frozen=True, slots=True)
class TrainerPaths:
    """The trainer's inputs and outputs.

    Attributes:
        policy: the checkpoint to start from, also the critic's backbone.
        prompts: JSONL file with `input`, the rendered prompt, and `label`, the row as JSON.
        reward: URL of `/get_reward`, or a Python file with `reward_func`.
        output: folder for the trained policy, the checkpoints and TensorBoard's curves.
    """

    policy: Path
    prompts: Path
    reward: str
    output: Path


def flags(config: Config, paths: TrainerPaths) -> list[str]:
    """The trainer's command line options.

    Raises:
        UserError: OpenRLHF does not support a setting of the config.
    """
    options: list[str] = []
    for key, names in FLAGS.items():
        section, _, field = key.partition(".")
        for name in names:
            options += _flag(name, getattr(getattr(config, section), field))
    for name, value in (*_paths(config, paths), *_devices(config), *_batches(config), *_algorithm(config)):
        options += _flag(name, value)
    return options


def unsupported_settings(config: Config) -> list[str]:
    """The settings of PPO that differ from their defaults and have no option in OpenRLHF, by dotted key."""
    known, default = {*FLAGS, *DERIVED}, Config()
    found = []
    for section in ("ppo", "learner", "rollout"):
        ours, theirs = getattr(config, section), getattr(default, section)
        for field in fields(ours):
            key = f"{section}.{field.name}"
            if key not in known and getattr(ours, field.name) != getattr(theirs, field.name):
                found.append(key)
    return found


def _flag(name: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [name]
    return [name, *map(str, value if isinstance(value, tuple) else (value,))]


def _paths(config: Config, paths: TrainerPaths) -> Iterator[tuple[str, Any]]:
    yield "--actor.model_name_or_path", paths.policy
    if _estimator(config) == "gae":
        yield "--critic.model_name_or_path", paths.policy
    yield "--data.prompt_dataset", paths.prompts
    yield "--data.input_key", "input"
    yield "--data.label_key", "label"
    yield "--reward.remote_url", paths.reward
    yield "--ckpt.output_dir", paths.output / "policy"
    yield "--ckpt.path", paths.output / "checkpoints"
    yield "--logger.tensorboard_dir", paths.output / "tensorboard"
    yield "--ds.attn_implementation", "sdpa"  # flash-attn is not in our requirements


def _devices(config: Config) -> Iterator[tuple[str, Any]]:
    """One GPU for each rank of each model and for each engine. If there are fewer, all share them in turns."""
    ranks, engines = config.learner.world_size, config.rollout.engines * config.rollout.tensor_parallel
    for model in ("actor", "ref", "critic", "reward"):
        yield f"--{model}.num_gpus_per_node", ranks
    models = 3 if _estimator(config) == "gae" else 2
    if 0 < config.cluster.gpus < models * ranks + engines:
        if ranks != engines:
            raise UserError(
                f"cluster.gpus: expected {models * ranks + engines}, found {config.cluster.gpus}; raise it, or set as "
                f"many engine GPUs as learners, which then share them (now {engines} and {ranks})"
            )
        yield from (("--train.colocate_all", True), ("--vllm.enable_sleep", True), ("--ds.enable_sleep", True))
    yield "--vllm.enforce_eager", config.cluster.gpus == 0


def _batches(config: Config) -> Iterator[tuple[str, Any]]:
    """OpenRLHF measures a micro-batch in samples, and a rank's share of a minibatch must be a multiple of it."""
    samples = config.ppo.prompts_per_step * config.ppo.samples_per_prompt
    minibatch = min(config.learner.minibatch_size, samples)
    share, rest = divmod(minibatch, config.learner.world_size)
    if rest:
        ranks = f"learner.world_size={config.learner.world_size}"
        raise UserError(f"learner.minibatch_size: expected a multiple of {ranks}, found {minibatch}")
    fitting = max(1, config.learner.micro_batch_tokens // config.model.max_tokens)
    micro = max(size for size in range(1, min(share, fitting) + 1) if share % size == 0)
    yield "--train.batch_size", minibatch
    yield "--train.micro_batch_size", micro
    yield "--rollout.micro_batch_size", micro


def _algorithm(config: Config) -> Iterator[tuple[str, Any]]:
    ppo, learner = config.ppo, config.learner
    yield "--algo.advantage.estimator", _estimator(config)
    yield "--algo.kl.estimator", ppo.kl_by
    yield "--algo.kl.use_loss", ppo.kl_in_loss
    if ppo.kl == "adaptive":
        yield "--algo.kl.target", ppo.kl_target
        yield "--algo.kl.horizon", ppo.kl_horizon
    yield "--actor.eps_clip_low_high", (learner.clip_low, learner.clip_high)
    yield "--critic.value_clip", learner.value_clip or float("inf")
    steps = -(-ppo.prompts_per_step * ppo.samples_per_prompt // learner.minibatch_size) * ppo.steps * learner.epochs
    for model in ("actor", "critic"):
        yield f"--{model}.lr_warmup_ratio", learner.warmup_steps / steps


def _estimator(config: Config) -> str:
    return ESTIMATORS[config.ppo.algorithm]
