"""Our settings as options of OpenRLHF 0.11's PPO trainer. Light."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from metaalign_rl.config.schema import Config
from metaalign_rl.core.errors import UserError

# What carries over as it is: a number, a word, several values of one option, or a switch.
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
# What `flags` works out from several of our settings, or does otherwise.
WORKED_OUT = (
    "ppo.algorithm", "ppo.steps", "ppo.sampler", "ppo.model_weight", "ppo.kl", "ppo.kl_target", "ppo.kl_horizon",
    "ppo.kl_estimator", "ppo.kl_in", "learner.clip_low", "learner.clip_high", "learner.value_clip",
    "learner.minibatch_size", "learner.micro_batch_tokens", "learner.warmup_steps",
)  # fmt: skip
ESTIMATORS = {"ppo": "gae", "rloo": "rloo", "reinforce++": "reinforce", "grpo": "group_norm"}


@dataclass(frozen=True, slots=True)
class Places:
    """What the trainer reads and writes.

    Attributes:
        policy: the checkpoint to start from, also the critic's backbone.
        prompts: JSONL with `input`, the rendered prompt, and `label`, the row as JSON.
        reward: the address of `/get_reward`.
        output: where the trained policy goes; checkpoints and TensorBoard's curves go beside it.
    """

    policy: Path
    prompts: Path
    reward: str
    output: Path


def flags(config: Config, places: Places) -> list[str]:
    """The trainer's command line, without what starts it.

    Raises:
        UserError: OpenRLHF cannot do what the config says.
    """
    words: list[str] = []
    for key, names in FLAGS.items():
        section, _, field = key.partition(".")
        for name in names:
            words += _flag(name, getattr(getattr(config, section), field))
    for name, value in (*_places(config, places), *_devices(config), *_batches(config), *_algorithm(config)):
        words += _flag(name, value)
    return words


def left_out(config: Config) -> list[str]:
    """The settings of PPO that differ from their defaults and that OpenRLHF has no option for."""
    known, default = {*FLAGS, *WORKED_OUT}, Config()
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


def _places(config: Config, places: Places) -> Iterator[tuple[str, Any]]:
    yield "--actor.model_name_or_path", places.policy
    if _estimator(config) == "gae":
        yield "--critic.model_name_or_path", places.policy
    yield "--data.prompt_dataset", places.prompts
    yield "--data.input_key", "input"
    yield "--data.label_key", "label"
    yield "--reward.remote_url", places.reward
    yield "--ckpt.output_dir", places.output / "policy"
    yield "--ckpt.path", places.output / "checkpoints"
    yield "--logger.tensorboard_dir", places.output / "tensorboard"
    yield "--ds.attn_implementation", "sdpa"  # flash-attn is not among our pins


def _devices(config: Config) -> Iterator[tuple[str, Any]]:
    """A GPU for each rank of each model and each engine; where there are fewer, all share them in turns."""
    ranks, engines = config.learner.world_size, config.rollout.engines * config.rollout.tensor_parallel
    for model in ("actor", "ref", "critic", "reward"):
        yield f"--{model}.num_gpus_per_node", ranks
    models = 3 if _estimator(config) == "gae" else 2
    if 0 < config.cluster.gpus < models * ranks + engines:
        if ranks != engines:
            raise UserError(
                f"cluster.gpus: expected {models * ranks + engines}, or as many engines as learners, which then share "
                f"GPUs; found {config.cluster.gpus} for learner.world_size={ranks} and engines on {engines}"
            )
        yield from (("--train.colocate_all", True), ("--vllm.enable_sleep", True), ("--ds.enable_sleep", True))
    yield "--vllm.enforce_eager", config.cluster.gpus == 0


def _batches(config: Config) -> Iterator[tuple[str, Any]]:
    """OpenRLHF counts a micro-batch in samples, of which a minibatch holds a whole number on each rank."""
    samples = config.ppo.prompts_per_step * config.ppo.samples_per_prompt
    minibatch = min(config.learner.minibatch_size, samples)
    share, rest = divmod(minibatch, config.learner.world_size)
    if rest:
        raise UserError(
            f"learner.minibatch_size: expected a multiple of learner.world_size={config.learner.world_size}, "
            f"found {minibatch}"
        )
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
