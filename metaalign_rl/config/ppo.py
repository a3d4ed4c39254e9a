"""The settings of PPO and the algorithms without a critic."""

from dataclasses import dataclass
from typing import Literal

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.settings import PLAIN, require, require_at_least, require_options, require_positive, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class PPOConfig:
    """The algorithm, the size of a step, the reward and the KL penalty. docs/ppo.md explains them."""

    algorithm: Literal["ppo", "rloo", "reinforce++", "grpo"] = setting(
        "ppo", "The RL algorithm. Only `ppo` trains a critic.", level="core"
    )
    steps: int = setting(
        60,
        "Steps of the run. Each one rolls out, scores, updates and syncs weights.",
        unit="steps",
        level="core",
    )
    prompts_per_step: int = setting(128, "Prompts sampled per step.", unit="rows", level="core")
    samples_per_prompt: int = setting(4, "Responses to each prompt.", unit="samples", level="core")
    model_weight: float = setting(
        1.0,
        "Weight of the reward model in the reward. The reward is the weighted mean of reward model, checks and "
        "function.",
        unit="weight",
    )
    checks_weight: float = setting(0.0, "Weight of the rows' own gold checks in the reward.", unit="weight")
    function_weight: float = setting(0.0, "Weight of reward.function in the reward.", unit="weight")
    reward_clip: tuple[float, float] | None = setting(
        None,
        "Lowest and highest reward: the weighted mean is clipped to this range. `null` does not clip.",
        unit="reward",
    )
    unfinished: Literal["none", "penalty", "mask"] = setting(
        "none",
        "What happens to a response that is truncated at rollout.max_new_tokens. `none` treats it like a finished one, "
        "`penalty` subtracts ppo.unfinished_penalty from its reward, `mask` leaves its tokens out of the loss.",
    )
    unfinished_penalty: float = setting(
        1.0, "Subtracted from the reward of a truncated response (ppo.unfinished=penalty only).", unit="reward"
    )
    overlong_tokens: int = setting(
        0,
        "In the last n tokens before rollout.max_new_tokens, a penalty grows linearly to ppo.overlong_penalty "
        "(DAPO, arXiv:2503.14476). 0 turns it off.",
        unit="tokens",
    )
    overlong_penalty: float = setting(
        1.0,
        "Subtracted from the reward of a response of rollout.max_new_tokens tokens (with ppo.overlong_tokens only).",
        unit="reward",
    )
    skip_equal_groups: bool = setting(
        False,
        "Leave prompts out of the loss whose responses all have the same reward (`rloo` and `grpo` only). Such a "
        "prompt shows no response that is better than another.",
    )
    sampler: dict[str, float] = setting(
        {},
        'Sampling weights by "tier" or "tier/relation". A group without a weight is not sampled. If empty, every row '
        "is sampled once before any row a second time.",
        unit="weight",
    )
    gamma: float = setting(1.0, "Discount per token.", unit=PLAIN)
    lam: float = setting(0.95, "Lambda of GAE (`ppo` only).", unit=PLAIN)
    kl: Literal["fixed", "adaptive"] = setting(
        "fixed", "`fixed` keeps ppo.kl_coef, `adaptive` steers it so that the KL approaches ppo.kl_target."
    )
    kl_coef: float = setting(
        0.03, "Weight of the KL divergence from the policy that PPO starts from.", unit=PLAIN, level="core"
    )
    kl_target: float = setting(0.1, "Target for the KL of a response (adaptive only).", unit="nats per response")
    kl_horizon: int = setting(
        10_000, "Speed of the adaptive KL: with a larger number, ppo.kl_coef changes more slowly.", unit="samples"
    )
    kl_in: Literal["reward", "loss"] | None = setting(
        None,
        "Where the KL penalty is applied. `null` follows the algorithm's paper: the loss with `grpo`, else the reward.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] | None = setting(
        None, "Estimator of the KL. `null` is k1 in the reward and k3 in the loss."
    )
    normalize_per_tier: bool = setting(
        False, "Whiten rewards within each governing tier, with a floor on the standard deviation."
    )
    flips: bool = setting(
        False,
        "Roll out each conflict row together with a second one: the same dialog with the texts of the tiers swapped.",
    )
    max_mismatch: float | None = setting(
        None,
        "Mean |Δ log p| between learner and an engine above which the run stops in any case. `null` is 0.01 in float32 "
        "and 0.2 in bfloat16, whose rounding alone can be 0.05.",
        unit="nats per token",
    )
    max_mismatch_growth: float = setting(
        1.5,
        "Growth of an engine's mismatch above which the run stops: relative to the run's first step, where only "
        "rounding separates learner and engine. Relative to the other engines, half of that growth is allowed.",
        unit="times",
    )
    reward_workers: int = setting(1, "Processes that score responses in parallel.", unit="count")
    stream_chunks: int = setting(
        4,
        "Into about how many chunks a step's responses are split. Reward workers and learners process each chunk as "
        "soon as it is finished.",
        unit="count",
    )
    staleness: Literal[0, 1] = setting(
        0,
        "With 1, the engines generate the next step's responses while the learners update. Needs learner.correction.",
        unit="steps",
    )
    in_flight: bool = setting(False, "With ppo.staleness=1, engines switch to new weights in the middle of responses.")
    deterministic: bool = setting(
        False,
        "Give the same metrics in every run, also after a fault. This is slower, because each sample has its own seed "
        "and less work overlaps.",
    )
    critic_warmup_steps: int = setting(
        0, "The first n steps update only the critic (`ppo` only). The policy stays as it is.", unit="steps"
    )
    save_steps: int = setting(20, "Steps between two checkpoints to resume from.", unit="steps")
    keep_checkpoints: int = setting(
        2,
        "How many of the newest checkpoints to keep. The best checkpoint is kept as well; see ppo.evaluate_steps.",
        unit="count",
    )
    evaluate_steps: int = setting(
        0,
        "Steps between two evaluations on held-out prompts, with greedy responses. Must divide ppo.save_steps. The "
        "best checkpoint has the best result. With 0 there is no evaluation, and the best checkpoint has the highest "
        "gold on training prompts.",
        unit="steps",
    )
    evaluate_rows: int = setting(256, "Held-out prompts per evaluation, always the same ones.", unit="rows")

    def __post_init__(self) -> None:
        counts = ("steps", "prompts_per_step", "samples_per_prompt", "reward_workers", "stream_chunks", "kl_horizon")
        require_at_least(self, "ppo.", 1, (*counts, "save_steps", "keep_checkpoints", "evaluate_rows"))
        require_at_least(self, "ppo.", 0, ("model_weight", "checks_weight", "function_weight", "kl_coef"))
        require_at_least(self, "ppo.", 0, ("overlong_tokens", "evaluate_steps", "critic_warmup_steps"))
        require_positive(self, "ppo.", ("kl_target", "unfinished_penalty", "overlong_penalty"))
        require_options(self, "ppo.")
        for key in ("gamma", "lam"):
            require(f"ppo.{key}", 0 <= getattr(self, key) <= 1, "a number from 0 to 1", getattr(self, key))
        limit = self.max_mismatch
        require("ppo.max_mismatch", limit is None or limit > 0, "a number above 0, or null", limit)
        clip = self.reward_clip
        require("ppo.reward_clip", clip is None or clip[0] < clip[1], "two numbers, the second one larger", clip)
        is_divisor = not self.evaluate_steps or self.save_steps % self.evaluate_steps == 0
        divisor = f"0, or a divisor of ppo.save_steps={self.save_steps}, so that every checkpoint has a result"
        require("ppo.evaluate_steps", is_divisor, divisor, self.evaluate_steps)
        growth = self.max_mismatch_growth
        require("ppo.max_mismatch_growth", growth > 1, "a number above 1", growth)
        for name, weight in self.sampler.items():
            require(f"ppo.sampler.{name}", weight >= 0, "0 or more", weight)
        self._check_algorithm()
        if self.model_weight + self.checks_weight + self.function_weight == 0:
            raise UserError(
                "ppo.model_weight, ppo.checks_weight and ppo.function_weight: all are 0, so there is no reward; "
                "raise one of them"
            )

    def _check_algorithm(self) -> None:
        """Check the settings that depend on others."""
        require("ppo.in_flight", not self.in_flight or self.staleness > 0, "false without ppo.staleness=1", True)
        if self.kl == "adaptive":
            moves = "a number above 0 with ppo.kl=adaptive, which multiplies it"
            require("ppo.kl_coef", self.kl_coef > 0, moves, self.kl_coef)
        if self.deterministic:
            require("ppo.staleness", self.staleness == 0, "0 with ppo.deterministic=true", self.staleness)
        warmup, is_ppo = self.critic_warmup_steps, self.algorithm == "ppo"
        require("ppo.critic_warmup_steps", is_ppo or not warmup, f"0 with ppo.algorithm={self.algorithm}", warmup)
        require("ppo.critic_warmup_steps", warmup < self.steps, f"less than ppo.steps={self.steps}", warmup)
        if self.skip_equal_groups:
            compares = self.algorithm in ("rloo", "grpo")
            needed = "rloo or grpo with ppo.skip_equal_groups=true, which need responses that differ in reward"
            require("ppo.algorithm", compares, needed, self.algorithm)
        if self.algorithm in ("rloo", "grpo"):
            algorithm = f"with ppo.algorithm={self.algorithm}"
            several = f"2 or more {algorithm}, which compares the responses to a prompt"
            require("ppo.samples_per_prompt", self.samples_per_prompt >= 2, several, self.samples_per_prompt)
            undiscounted = f"1 {algorithm}, which treats a response as one action"
            require("ppo.gamma", self.gamma == 1, undiscounted, self.gamma)

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL penalty is a term of the loss; else it is in the reward."""
        return self.kl_in == "loss" or (self.kl_in is None and self.algorithm == "grpo")

    @property
    def kl_by(self) -> Literal["k1", "k2", "k3"]:
        """The estimator of the penalty's KL."""
        return self.kl_estimator or ("k3" if self.kl_in_loss else "k1")
