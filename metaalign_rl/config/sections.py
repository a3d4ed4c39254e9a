"""The settings of the run, the cluster, the data, the model, SFT, the engines, faults and the evaluation."""

import re
from dataclasses import dataclass
from typing import Literal

from metaalign_rl.core.dataflow import Sampling
from metaalign_rl.core.settings import (
    PLAIN,
    expand_paths,
    require,
    require_at_least,
    require_options,
    require_positive,
    setting,
)
from metaalign_rl.core.units import GIB, MIB

OBJECT_STORE_SHARE = 0.1  # share of cluster.memory_gib; batches pass through the store, and on CPUs also the weights
LEAST_OBJECT_STORE = 128 * MIB  # bytes; Ray refuses less than 75 MiB

_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The run's name, folder, seed and stages."""

    name: str = setting(
        "quickstart",
        "Name of the run's folder under run.root. A run with the same name and root resumes.",
        level="core",
    )
    root: str = setting(
        "runs",
        "Folder of all runs, on storage that every node sees. Submitted jobs need an absolute path.",
        level="core",
    )
    seed: int = setting(
        0, "Seed of the data, the new models, the order of rows and PPO's sampling.", unit=PLAIN, level="core"
    )
    stages: list[str] = setting(
        ["data", "sft", "reward", "ppo", "evaluate", "report"],
        "Stages to run, in this order. A finished stage is skipped.",
        level="core",
    )
    keep_rollouts: int = setting(
        1, "Save the responses of every n-th PPO step, with their scores and checks. 0 saves none.", unit="steps"
    )
    wandb_project: str = setting(
        "", "Also send PPO's metrics to this project on Weights & Biases. If empty, nothing is sent."
    )

    def __post_init__(self) -> None:
        expand_paths(self, "run.", ("root",))
        require_at_least(self, "run.", 0, ("keep_rollouts",))
        is_folder_name = bool(_NAME.fullmatch(self.name))
        require("run.name", is_folder_name, "a folder's name of letters, digits, . _ -", self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """The CPUs, GPUs, memory and disk space that the run needs, and the layout of its actors."""

    cpus: int = setting(
        2,
        "CPUs for the run's actors. Each actor gets a share of them, and one thread per CPU.",
        unit="count",
        level="core",
    )
    gpus: int = setting(0, "GPUs for the run's actors. 0 runs everything on CPUs.", unit="count", level="core")
    memory_gib: float = setting(8.0, "Memory that the run needs on the machine where it starts.", unit="GiB")
    disk_gib: float = setting(1.0, "Free disk space that the run needs under run.root.", unit="GiB")
    layout: Literal["disaggregated", "colocated"] = setting(
        "disaggregated",
        "`disaggregated` gives learners and engines separate devices. `colocated` lets them take turns on the same "
        "devices.",
        level="core",
    )
    pin: bool = setting(
        False, "Give each engine and learner its own CPUs. Use it only if nothing else runs on the machine."
    )
    placement_timeout: float = setting(
        120.0, "How long the run waits until the cluster has room for all its actors.", unit="seconds"
    )

    def __post_init__(self) -> None:
        require_positive(self, "cluster.", ("placement_timeout",))
        require_at_least(self, "cluster.", 1, ("cpus",))
        require_at_least(self, "cluster.", 0, ("gpus", "memory_gib", "disk_gib"))
        require_options(self, "cluster.")

    @property
    def object_store_bytes(self) -> int:
        """Size of the object store of a Ray that the run starts."""
        return max(LEAST_OBJECT_STORE, int(OBJECT_STORE_SHARE * self.memory_gib * GIB))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where rows come from, and how many."""

    source: Literal["world", "jsonl", "verih", "rpr", "multifaceted", "safe_rlhf", "hh_rlhf", "helpsteer2"] = setting(
        "world",
        "`world` is the built-in world. `jsonl` reads your own files in the project's schema, and `verih` reads "
        "VerIH's file. The others are published data sets of preference pairs.",
        level="core",
    )
    path: str = setting(
        "",
        "For `jsonl`, a folder with demonstrations/pairs/prompts/held_out_*.jsonl; for `verih`, its file. For the "
        "others, a hub id such as microsoft/rpr, or a folder or file of that data set.",
        level="core",
    )
    follow_rate: float = setting(
        0.6,
        "Share of the demonstrations that follow the governing preference (built-in world only). Human demonstrations "
        "are noisy, too.",
        unit="share",
    )
    demonstrations: int = setting(30_000, "Number of demonstrations to make (built-in world only).", unit="rows")
    pairs: int = setting(16_000, "Number of pairs to make, or the most to use of public data.", unit="rows")
    prompts: int = setting(8_000, "Number of prompts to make, or the most to use of public data.", unit="rows")
    held_out_prompts: int = setting(
        1_200,
        "Number of held-out prompts to make (built-in world only). The metrics in report.json count the responses to "
        "them.",
        unit="rows",
    )
    held_out_pairs: int = setting(
        1_600,
        "Number of held-out pairs to make, or the most to use of public data. The built-in world adds paraphrased "
        "pairs.",
        unit="rows",
    )
    paraphrased_wishes: int = setting(
        60,
        "Number of held-out preferences that are each worded in four ways. Prompts and pairs each get this many "
        "(built-in world only).",
        unit="preferences",
    )

    def __post_init__(self) -> None:
        expand_paths(self, "data.", ("path",))
        counts = ("demonstrations", "pairs", "prompts", "held_out_prompts", "held_out_pairs", "paraphrased_wishes")
        require_at_least(self, "data.", 1, counts)
        require("data.follow_rate", 0 <= self.follow_rate <= 1, "a share from 0 to 1", self.follow_rate)
        require_options(self, "data.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The language model: a checkpoint to start from, or the shape of a new small model."""

    path: str = setting(
        "", "Hugging Face checkpoint folder or hub id to start from. If empty, a new model is made.", level="core"
    )
    hidden_size: int = setting(128, "Hidden size of a new model.", unit=PLAIN)
    layers: int = setting(3, "Layers of a new model.", unit="count")
    heads: int = setting(4, "Attention heads of a new model. Must divide model.hidden_size.", unit="count")
    max_tokens: int = setting(
        160, "Context length: meta-prompt, dialog and response together.", unit="tokens", level="core"
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "Type of the weights in PPO and in the engines.", level="core"
    )

    def __post_init__(self) -> None:
        expand_paths(self, "model.", ("path",))
        require_at_least(self, "model.", 1, ("hidden_size", "layers", "heads", "max_tokens"))
        divides = self.hidden_size % self.heads == 0
        require("model.heads", divides, f"a divisor of model.hidden_size={self.hidden_size}", self.heads)
        require_options(self, "model.")


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTConfig:
    """Supervised fine-tuning on demonstrations, before PPO."""

    learning_rate: float = setting(
        2e-3,
        "Peak learning rate, which falls by a cosine. Use about 1e-5 for models with billions of parameters.",
        unit=PLAIN,
        level="core",
    )
    batch_size: int = setting(32, "Samples per optimizer step, over all devices and passes.", unit="rows")
    gradient_accumulation: int = setting(
        1, "Passes over which the samples of a step are spread, to save memory.", unit="passes"
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    epochs: float = setting(1.0, "Passes over the demonstrations.", unit="passes")
    warmup_ratio: float = setting(0.05, "Share of the steps in which the learning rate rises.", unit="share")
    weight_decay: float = setting(0.0, "AdamW's weight decay.", unit=PLAIN)
    save_steps: int = setting(500, "Steps between two checkpoints to resume from.", unit="optimizer steps")
    zero_stage: Literal[0, 1, 2] = setting(
        0, "DeepSpeed ZeRO stage. With stage 3, no rank would have all weights to save.", unit=PLAIN
    )

    def __post_init__(self) -> None:
        require_at_least(self, "sft.", 1, ("batch_size", "gradient_accumulation", "save_steps"))
        require_at_least(self, "sft.", 0, ("warmup_ratio", "weight_decay"))
        require_positive(self, "sft.", ("learning_rate", "epochs"))
        require("sft.warmup_ratio", self.warmup_ratio < 1, "a share below 1", self.warmup_ratio)
        require_options(self, "sft.")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """The vLLM engines, and how PPO samples its responses."""

    engines: int = setting(1, "vLLM engines that generate in parallel.", unit="count", level="core")
    tensor_parallel: int = setting(1, "Devices per engine.", unit="count")
    max_sequences: int = setting(256, "Sequences that an engine decodes together.", unit="sequences")
    max_new_tokens: int = setting(32, "Longest response that PPO samples.", unit="tokens", level="core")
    temperature: float = setting(
        1.0,
        "Sampling temperature. The learners divide the logits by it too, so that they train the distribution that is "
        "sampled.",
        unit=PLAIN,
    )
    top_p: float = setting(
        1.0,
        "Sample from the most likely tokens that together have this probability. Below 1, the gradient is biased; see "
        "docs/ppo.md.",
        unit="share",
    )
    stop: list[str] = setting(
        [], "Texts that end a response, in addition to the end token. The reward does not see them."
    )
    min_new_tokens: int = setting(
        0,
        "The end token is not sampled before this many tokens. Above 0, the gradient is biased; see docs/ppo.md.",
        unit="tokens",
    )
    kv_cache_gib: float = setting(1.0, "Size of an engine's KV cache (CPU only).", unit="GiB")
    gpu_memory_utilization: float = setting(0.4, "Share of a device's memory that an engine uses.", unit="share")
    batch_tokens: int | None = setting(
        None,
        "Prompt tokens that an engine reads in one step. `null` is vLLM's default for offline generation: 16,384 on "
        "GPUs of 70 GiB or more, except the A100, and 8,192 on others and on CPUs.",
        unit="tokens",
    )
    bucket_mib: int = setting(
        128,
        "Size of the pieces in which weights are sent to the engines. Ray's object store must have room for two of "
        "them.",
        unit="MiB",
    )

    def __post_init__(self) -> None:
        counts = ("engines", "tensor_parallel", "max_sequences", "max_new_tokens", "bucket_mib")
        require_at_least(self, "rollout.", 1, counts)
        require_at_least(self, "rollout.", 0, ("min_new_tokens",))
        require_positive(self, "rollout.", ("kv_cache_gib", "gpu_memory_utilization", "temperature", "top_p"))
        self._check_sampling()
        tokens = self.batch_tokens
        require("rollout.batch_tokens", tokens is None or tokens >= 1, "a number of at least 1, or null", tokens)
        share = self.gpu_memory_utilization
        require("rollout.gpu_memory_utilization", share <= 1, "a share of at most 1", share)

    def _check_sampling(self) -> None:
        require("rollout.top_p", self.top_p <= 1, "a share of at most 1", self.top_p)
        require("rollout.stop", all(self.stop), "texts that are not empty", self.stop)
        room = f"less than rollout.max_new_tokens={self.max_new_tokens}"
        require("rollout.min_new_tokens", self.min_new_tokens < self.max_new_tokens, room, self.min_new_tokens)
        # vLLM returns log-probabilities either before all of these are applied, or after all of them.
        is_full = self.top_p == 1 and not self.min_new_tokens
        full = "1 with rollout.top_p below 1 or rollout.min_new_tokens"
        require("rollout.temperature", self.temperature == 1 or is_full, full, self.temperature)

    @property
    def sampling(self) -> Sampling:
        """How PPO samples its responses."""
        return Sampling(self.temperature, self.max_new_tokens, self.top_p, tuple(self.stop), self.min_new_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """When an actor counts as lost, and when a run gives up. A lost actor is replaced and its work is repeated."""

    limit: int = setting(
        5,
        "A run ends when one actor, or the learners together, have more faults than this without a new step between "
        "them.",
        unit="count",
    )
    silence_s: float = setting(
        600.0,
        "Heartbeat deadline: a working actor that reports nothing for this long counts as hung. Set it above the "
        "longest learner step.",
        unit="seconds",
    )
    start_s: float = setting(1800.0, "Heartbeat deadline while an actor loads its model.", unit="seconds")

    def __post_init__(self) -> None:
        require_at_least(self, "faults.", 0, ("limit",))
        require_positive(self, "faults.", ("silence_s", "start_s"))


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """The evaluation by gold checks on held-out rows, before and after PPO."""

    temperature: float = setting(1.0, "Sampling temperature. Greedy results are reported as well.", unit=PLAIN)
    max_new_tokens: int = setting(32, "Longest response.", unit="tokens")

    def __post_init__(self) -> None:
        require_at_least(self, "evaluate.", 1, ("max_new_tokens",))
        require_positive(self, "evaluate.", ("temperature",))
