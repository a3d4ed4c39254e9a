"""All settings of a run, with the checks that concern several sections. Imports no heavy packages.

`metaalign_rl.config.loader.load` fills these classes from a YAML file and `key=value` words.
"""

from dataclasses import dataclass, field

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.ppo import PPOConfig
from metaalign_rl.config.reward import RewardConfig
from metaalign_rl.config.sections import (
    ClusterConfig,
    DataConfig,
    EvaluateConfig,
    FaultsConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SFTConfig,
)
from metaalign_rl.core.settings import require


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of one run."""

    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        self.learner.check_dtype(self.model.dtype)
        weight, function = self.ppo.function_weight, self.reward.function
        needed = (
            "a number above 0 with reward.function" if function else "0 without reward.function=path/to/file.py:name"
        )
        require("ppo.function_weight", bool(function) == (weight > 0), needed, weight)
        ranks = self.learner.world_size
        if "sft" in self.run.stages:
            shares = ranks * self.sft.gradient_accumulation
            wanted = f"a multiple of learner.world_size * sft.gradient_accumulation = {shares}"
            require("sft.batch_size", self.sft.batch_size % shares == 0, wanted, self.sft.batch_size)
        for name, tokens in (("rollout", self.rollout.max_new_tokens), ("evaluate", self.evaluate.max_new_tokens)):
            room = f"less than model.max_tokens={self.model.max_tokens}"
            require(f"{name}.max_new_tokens", tokens < self.model.max_tokens, room, tokens)
        limit, overlong = self.rollout.max_new_tokens, self.ppo.overlong_tokens
        require("ppo.overlong_tokens", overlong <= limit, f"at most rollout.max_new_tokens={limit}", overlong)
        steps, warmup = self.policy_optimizer_steps, self.learner.warmup_steps
        enough = f"less than {steps}, the policy's optimizer steps (after ppo.critic_warmup_steps)"
        require("learner.warmup_steps", warmup < steps, enough, warmup)
        self._check_layout()

    def _check_layout(self) -> None:
        layout, ranks = self.cluster.layout, self.learner.world_size
        if self.ppo.staleness:
            corrects = self.learner.correction != "off"
            require("learner.correction", corrects, "token or sequence with ppo.staleness=1", self.learner.correction)
            at_the_same_time = "disaggregated with ppo.staleness=1: engines and learners work at the same time"
            require("cluster.layout", layout == "disaggregated", at_the_same_time, layout)
        if layout == "colocated":
            devices = self.rollout.engines * self.rollout.tensor_parallel
            wanted = f"rollout.engines * rollout.tensor_parallel = {devices} with cluster.layout=colocated"
            require("learner.world_size", ranks == devices, wanted, ranks)

    @property
    def max_mismatch(self) -> float:
        """The limit of `ppo.max_mismatch`, nats per token. bfloat16 has about three significant digits."""
        default = 0.2 if self.model.dtype == "bfloat16" else 0.01
        return default if self.ppo.max_mismatch is None else self.ppo.max_mismatch

    def optimizer_steps(self, steps: int) -> int:
        """The optimizer steps of `steps` steps of PPO, if all responses enter the loss."""
        minibatches = -(-self.ppo.prompts_per_step * self.ppo.samples_per_prompt // self.learner.minibatch_size)
        return steps * self.learner.epochs * minibatches

    @property
    def policy_optimizer_steps(self) -> int:
        """The optimizer steps of the policy in the run, for its schedule: it rests in the critic's warm-up."""
        return self.learner.total_steps or self.optimizer_steps(self.ppo.steps - self.ppo.critic_warmup_steps)

    @property
    def shares_devices(self) -> bool:
        """Whether the engines work on the learners' devices."""
        return self.cluster.layout == "colocated" or self.cluster.gpus == 1

    @property
    def shares_gpus(self) -> bool:
        """Whether the engines work on the learners' GPUs, so that all must leave room for each other."""
        return self.cluster.gpus > 0 and self.shares_devices
