"""Every setting of a run: typed, with its default, unit and meaning beside it.

`metaalign_rl.config.loader.load` fills these from a YAML file and `key=value` words. No heavy import here.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.units import GIB, MIB
from metaalign_rl.core.views import Control, View

OBJECT_STORE_SHARE = 0.1  # of cluster.memory_gib; experience passes through the store, and on CPUs the weights
LEAST_OBJECT_STORE = 128 * MIB  # bytes; Ray refuses less than 75 MiB

_NAME = re.compile(r"\w[\w.-]*")
_FUNCTION = re.compile(r".+\.py:\w+")


def _require(key: str, good: bool, expected: str, found: Any) -> None:
    if not good:
        raise UserError(f"{key}: expected {expected}, found {found!r}")


def _require_least(section: Any, name: str, least: float, keys: str) -> None:
    for key in keys.split():
        value = getattr(section, key)
        _require(f"{name}.{key}", value >= least, f"{least:g} or more", value)


def _require_positive(section: Any, name: str, keys: str) -> None:
    for key in keys.split():
        value = getattr(section, key)
        _require(f"{name}.{key}", value > 0, "a number above 0", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The identity of the run. The same name under the same root resumes."""

    name: str = "quickstart"  # the folder under run.root; the same name resumes
    root: str = "runs"  # a folder on storage that every node sees; absolute for submitted jobs
    seed: int = 0  # of the data, the new models, the order of rows and what PPO draws
    stages: list[str] = field(
        default_factory=lambda: ["data", "sft", "reward", "ppo", "evaluate", "report"]
    )  # in this order; a finished one is skipped
    keep_rollouts: int = 1  # PPO keeps the answers of every n-th step, with scores and checks; 0: of none
    wandb_project: str = ""  # also send PPO's metrics to this project on Weights & Biases; empty: nothing leaves

    def __post_init__(self) -> None:
        _require_least(self, "run", 0, "keep_rollouts")
        _require("run.name", bool(_NAME.fullmatch(self.name)), "one folder's name: letters, digits, . _ -", self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """What the run asks of Ray."""

    cpus: int = 2  # CPUs that the run's actors share; each gets its part, and as many threads
    gpus: int = 0  # GPUs; 0 runs everything on CPUs
    memory_gib: float = 8.0  # memory that the run needs on the machine where it starts
    disk_gib: float = 1.0  # free space needed under run.root
    layout: Literal["disaggregated", "colocated"] = (
        "disaggregated"  # engines beside the learners, or on their devices in turns
    )
    pin: bool = False  # each engine and learner stays on CPUs of its own, where nothing else runs on the machine
    placement_timeout: float = 120.0  # seconds in which the cluster must have room for all actors

    def __post_init__(self) -> None:
        _require_positive(self, "cluster", "placement_timeout")
        _require_least(self, "cluster", 1, "cpus")
        _require_least(self, "cluster", 0, "gpus memory_gib disk_gib")

    @property
    def object_store_bytes(self) -> int:
        """Size of the object store of a Ray that the run starts."""
        return max(LEAST_OBJECT_STORE, int(OBJECT_STORE_SHARE * self.memory_gib * GIB))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where rows come from: the built-in world, JSONL files in the project's schema, VerIH, or public pairs."""

    source: Literal["world", "jsonl", "verih", "rpr", "multifaceted", "safe_rlhf", "hh_rlhf", "helpsteer2"] = (
        "world"  # the built-in world, your own files, VerIH's file, or published preference pairs
    )
    path: str = (
        ""  # jsonl: a folder with demonstrations/pairs/prompts/held_out_*.jsonl; verih: the file;
        # others: a hub id such as microsoft/rpr, or a folder or file of that data set
    )
    follow_rate: float = 0.6  # share of demonstrations that follow what governs; human ones are noisy (world only)
    demonstrations: int = 30_000  # rows to make of each use (world only)
    pairs: int = 16_000  # to make, or at most to take of public data
    prompts: int = 8_000  # to make, or at most to take of public data
    held_out_prompts: int = 1_200  # to make; answers to these are what report.json counts (world only)
    held_out_pairs: int = 1_600  # to make (paraphrased ones come on top), or at most to take of public data
    paraphrased_wishes: int = 60  # held-out wishes that are each said in four ways, for answers and as many for pairs

    def __post_init__(self) -> None:
        _require_least(
            self, "data", 1, "demonstrations pairs prompts held_out_prompts held_out_pairs paraphrased_wishes"
        )
        _require("data.follow_rate", 0 <= self.follow_rate <= 1, "a share", self.follow_rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The language model: a checkpoint to start from, or the shape of a small one made from nothing."""

    path: str = ""  # a Hugging Face checkpoint folder or hub id; empty makes a new model
    hidden_size: int = 128  # width of a new model
    layers: int = 3  # of a new model
    heads: int = 4  # attention heads of a new model; must divide model.hidden_size
    max_tokens: int = 160  # context: meta-prompt, dialog and response
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights in PPO and in the engines

    def __post_init__(self) -> None:
        _require_least(self, "model", 1, "hidden_size layers heads max_tokens")
        good = self.hidden_size % self.heads == 0
        _require("model.heads", good, f"a divisor of model.hidden_size={self.hidden_size}", self.heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTConfig:
    """The warm start on demonstrations."""

    learning_rate: float = 2e-3  # peak, falling by a cosine; about 1e-5 for billions of parameters
    batch_size: int = 32  # samples a step, over all devices
    epochs: float = 1.0  # passes over the demonstrations
    warmup_ratio: float = 0.05  # share of the steps in which the learning rate rises
    weight_decay: float = 0.0  # AdamW's
    save_steps: int = 500  # steps between two checkpoints to resume from
    zero_stage: Literal[0, 1, 2] = 0  # DeepSpeed ZeRO stage; 3 would leave no rank a whole model to save

    def __post_init__(self) -> None:
        _require_least(self, "sft", 1, "batch_size save_steps")
        _require_least(self, "sft", 0, "warmup_ratio weight_decay")
        _require_positive(self, "sft", "learning_rate epochs")
        _require("sft.warmup_ratio", self.warmup_ratio < 1, "a share below 1", self.warmup_ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """Training of the reward model, and which of its scores PPO uses."""

    path: str = ""  # an existing reward model; empty trains one
    url: str = ""  # a server that scores for PPO instead, as metaalign-reward serve; its token: METAALIGN_REWARD_TOKEN
    function: str = ""  # your own, path/to/file.py:name, on storage that every node sees: (rows, answers) -> numbers
    mode: Literal["tier", "overall", "composed"] = (
        "overall"  # which score is the reward; docs/scorer.md has the formulas
    )
    view: View = "whole"  # what of a row PPO's reward model sees; less than the whole is for ablations
    devices: int = 1  # that train a model together; with more than one the controls follow it, one after the other
    zero_stage: Literal[0, 1, 2] = 0  # DeepSpeed ZeRO stage on several devices; 3 would leave no rank a whole model
    learning_rate: float = 1e-3  # peak; about 1e-5 for billions of parameters
    batch_size: int = 16  # pairs a step, over all devices
    epochs: float = 1.0  # passes over the pairs and the policy's own answers
    margin: float = 0.0  # gap, in logits, below which a pair's loss stays large; times its strength where a row has one
    label_smoothing: float = 0.0  # share of the pairs and labels that are taken to be wrong
    lora_rank: int = 0  # train adapters of this rank in the backbone, and the head; 0 trains all weights
    lora_alpha: float = 32.0  # an adapter's product counts lora_alpha / lora_rank times
    token_weight: float = 1.0  # weight of the loss at each token of an answer beside the loss at its end
    easy_first_fraction: float = 0.08  # share of the rows that come first: pairs of a right and a wrong answer
    on_policy_prompts: int = 2_000  # prompts answered by the SFT policy, labelled by the rows' checks
    on_policy_samples: int = 4  # answers a prompt
    controls: list[Control] = field(
        default_factory=lambda: ["preference_blind", "tier_blind"]
    )  # also train these, each without one thing the model has; scalar: without labels by tier; []: none

    def __post_init__(self) -> None:
        _require_least(self, "reward", 1, "devices batch_size on_policy_samples")
        _require_least(
            self, "reward", 0, "token_weight easy_first_fraction on_policy_prompts margin label_smoothing lora_rank"
        )
        good = self.batch_size % self.devices == 0
        _require("reward.batch_size", good, f"a multiple of reward.devices={self.devices}", self.batch_size)
        _require("reward.label_smoothing", self.label_smoothing < 0.5, "a share below 0.5", self.label_smoothing)
        _require(
            "reward.easy_first_fraction", self.easy_first_fraction < 1, "a share below 1", self.easy_first_fraction
        )
        _require_positive(self, "reward", "learning_rate epochs lora_alpha")
        _require("reward.url", not self.url or "://" in self.url, "such as http://127.0.0.1:8300", self.url)
        _require("reward.url", not (self.url and self.path), "nothing beside reward.path", self.url)
        good = not self.function or bool(_FUNCTION.fullmatch(self.function))
        _require("reward.function", good, "path/to/file.py:name", self.function)
        if self.view != "whole":
            _require("reward.path", bool(self.path), f"a control's folder beside reward.view={self.view}", self.path)
            _require("reward.mode", self.mode == "overall", f"overall beside reward.view={self.view}", self.mode)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """The vLLM engines. PPO samples at temperature 1, from the distribution that it trains."""

    engines: int = 1  # vLLM engines that answer side by side
    tensor_parallel: int = 1  # devices an engine
    max_sequences: int = 256  # sequences decoded together
    max_new_tokens: int = 32  # longest answer that PPO draws
    kv_cache_gib: float = 1.0  # CPU only
    gpu_memory_utilization: float = 0.4  # share of the device's memory
    bucket_mib: int = 128  # weights that are on their way to the engines at a time, twice in Ray's object store

    def __post_init__(self) -> None:
        _require_least(self, "rollout", 1, "engines tensor_parallel max_sequences max_new_tokens bucket_mib")
        _require_positive(self, "rollout", "kv_cache_gib gpu_memory_utilization")
        share = self.gpu_memory_utilization
        _require("rollout.gpu_memory_utilization", share <= 1, "a share, at most 1", share)


@dataclass(frozen=True, kw_only=True, slots=True)
class PPOConfig:
    """The PPO loop. docs/ppo.md explains the algorithms."""

    algorithm: Literal["ppo", "rloo", "reinforce++", "grpo"] = "ppo"  # only ppo learns a critic
    steps: int = 60  # each rolls out, scores, updates and sends weights; the whole run's number
    prompts_per_step: int = 128  # rows drawn a step
    samples_per_prompt: int = 4  # answers to each of them
    model_weight: float = 1.0  # weight of the reward model in the reward
    checks_weight: float = 0.0  # weight of the rows' own gold checks in the reward
    function_weight: float = 0.0  # weight of reward.function in the reward, which is the weighted mean of the three
    sampler: dict[str, float] = field(
        default_factory=dict
    )  # weight by "tier" or "tier/relation"; empty: as in the data
    gamma: float = 1.0  # discount a token
    lam: float = 0.95  # of GAE, ppo only
    kl: Literal["fixed", "adaptive"] = "fixed"  # whether ppo.kl_coef stays, or is steered to ppo.kl_target
    kl_coef: float = 0.03  # weight of the KL to the policy that PPO starts from
    kl_target: float = 0.1  # nats a response, adaptive only
    kl_horizon: int = 10_000  # samples, adaptive only
    kl_in: Literal["reward", "loss"] | None = None  # null: as the algorithm's paper, loss under grpo, else reward
    kl_estimator: Literal["k1", "k2", "k3"] | None = None  # null: k1 in the reward, k3 in the loss
    normalize_per_tier: bool = False  # whiten rewards within each governing tier, with a floor on the deviation
    flips: bool = False  # roll out conflicts in pairs: the same dialog with the tiers' texts in each other's place
    max_mismatch: float | None = None  # mean |Δ log p| a token between learner and engine above which the run stops;
    # null: 0.01 in float32, 0.05 in bfloat16
    reward_workers: int = 1  # processes that score answers side by side
    stream_chunks: int = (
        4  # a step's samples go on to reward workers and learners in about so many parts, as they finish
    )
    staleness: Literal[0, 1] = 0  # 1: roll the next step out while the learners learn; needs learner.correction
    in_flight: bool = False  # with staleness: engines take new weights in the middle of their answers
    deterministic: bool = False  # the same metrics again, and after a fault; costs seeds of their own and some overlap
    save_steps: int = 20  # steps between two checkpoints to resume from
    keep_checkpoints: int = 2  # the newest ones; the best by gold, as `best`, comes on top

    def __post_init__(self) -> None:
        _require_least(
            self, "ppo", 1, "steps prompts_per_step samples_per_prompt reward_workers stream_chunks kl_horizon"
        )
        _require_least(self, "ppo", 1, "save_steps keep_checkpoints")
        _require_least(self, "ppo", 0, "model_weight checks_weight function_weight kl_coef")
        _require_positive(self, "ppo", "kl_target")
        for key in ("gamma", "lam"):
            _require(f"ppo.{key}", 0 <= getattr(self, key) <= 1, "a number from 0 to 1", getattr(self, key))
        limit = self.max_mismatch
        _require("ppo.max_mismatch", limit is None or limit > 0, "a number above 0, or null", limit)
        for name, weight in self.sampler.items():
            _require(f"ppo.sampler.{name}", weight >= 0, "0 or more", weight)
        _require("ppo.in_flight", not self.in_flight or self.staleness > 0, "false without ppo.staleness=1", True)
        if self.kl == "adaptive":
            _require("ppo.kl_coef", self.kl_coef > 0, "above 0 beside ppo.kl=adaptive, which multiplies it", 0.0)
        if self.deterministic:
            _require("ppo.staleness", self.staleness == 0, "0 beside ppo.deterministic=true", self.staleness)
        if self.algorithm in ("rloo", "grpo"):
            name = f"under ppo.algorithm={self.algorithm}"
            least = f"2 or more {name}, which compares a prompt's answers"
            _require("ppo.samples_per_prompt", self.samples_per_prompt >= 2, least, self.samples_per_prompt)
            _require("ppo.gamma", self.gamma == 1, f"1 {name}, to which an answer is one action", self.gamma)
        if self.model_weight + self.checks_weight + self.function_weight == 0:
            raise UserError(
                "ppo.model_weight, ppo.checks_weight and ppo.function_weight are all 0, which leaves no reward; "
                "raise one"
            )

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL penalty is a term of the loss; else it is in the reward."""
        return self.kl_in == "loss" or (self.kl_in is None and self.algorithm == "grpo")

    @property
    def kl_by(self) -> Literal["k1", "k2", "k3"]:
        """The estimator of the penalty's KL."""
        return self.kl_estimator or ("k3" if self.kl_in_loss else "k1")


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """When an actor is taken for lost, and when a run gives up. A lost actor is replaced and its work done again."""

    limit: int = 5  # faults of one actor, or of the learners, without a new step between them that a run survives
    silence_s: float = 600.0  # an actor at work that says nothing for so long hangs; above the longest learner step
    start_s: float = 1800.0  # the same while it loads its model

    def __post_init__(self) -> None:
        _require_least(self, "faults", 0, "limit")
        _require_positive(self, "faults", "silence_s start_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Gold-checked evaluation on the held-out rows, before and after PPO."""

    temperature: float = 1.0  # of the sampled figures; the greedy ones come beside them
    max_new_tokens: int = 32  # longest answer

    def __post_init__(self) -> None:
        _require_least(self, "evaluate", 1, "max_new_tokens")
        _require_positive(self, "evaluate", "temperature")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run, whole."""

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
        needed = "above 0 beside reward.function" if function else "0 without reward.function=path/to/file.py:name"
        _require("ppo.function_weight", bool(function) == (weight > 0), needed, weight)
        ranks = self.learner.world_size
        good = self.sft.batch_size >= ranks
        _require("sft.batch_size", good, f"at least learner.world_size={ranks}", self.sft.batch_size)
        for name, tokens in (("rollout", self.rollout.max_new_tokens), ("evaluate", self.evaluate.max_new_tokens)):
            room = f"less than model.max_tokens={self.model.max_tokens}"
            _require(f"{name}.max_new_tokens", tokens < self.model.max_tokens, room, tokens)
        if self.ppo.staleness:
            corrected = self.learner.correction != "off"
            _require("learner.correction", corrected, "token or sequence beside ppo.staleness=1", "off")
            busy = "disaggregated beside ppo.staleness=1: engines and learners work at the same time"
            _require("cluster.layout", self.cluster.layout == "disaggregated", busy, self.cluster.layout)
        if self.cluster.layout == "colocated":
            devices = self.rollout.engines * self.rollout.tensor_parallel
            wanted = f"rollout.engines * rollout.tensor_parallel = {devices} under cluster.layout=colocated"
            _require("learner.world_size", ranks == devices, wanted, ranks)
            good = self.ppo.staleness == 0  # engines that draw would not leave the memory that the learners want
            _require("ppo.staleness", good, "0 under cluster.layout=colocated", self.ppo.staleness)

    @property
    def max_mismatch(self) -> float:
        """Nats a token by which learner and engine may differ; bfloat16 has three digits."""
        default = 0.05 if self.model.dtype == "bfloat16" else 0.01
        return default if self.ppo.max_mismatch is None else self.ppo.max_mismatch

    @property
    def shares_devices(self) -> bool:
        """Whether the engines work on the learners' devices."""
        return self.cluster.layout == "colocated" or self.cluster.gpus == 1
