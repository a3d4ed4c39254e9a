"""The workload of one PPO step: how many responses, of which length, by which models."""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from metaalign_rl.config.schema import Config
from metaalign_rl.plan.rates import Device
from metaalign_rl.plan.shape import Shape

Settings: TypeAlias = dict[str, Any]  # by dotted key


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The prompts and responses of one PPO step.

    Attributes:
        prompts: number of prompts.
        samples_per_prompt: responses per prompt.
        prompt_tokens, response_tokens: mean lengths.
        longest_response: length of the longest response, in tokens.
    """

    prompts: int
    samples_per_prompt: int
    prompt_tokens: float
    response_tokens: float
    longest_response: int

    @property
    def samples(self) -> int:
        """Number of responses."""
        return self.prompts * self.samples_per_prompt

    @property
    def length(self) -> float:
        """Mean tokens of a prompt with its response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def total_response_tokens(self) -> float:
        """Tokens of all responses."""
        return self.samples * self.response_tokens

    def tokens_read(self, share_prompts: bool) -> float:
        """Tokens that a model reads: all responses, and each prompt once, or once per response if not shared."""
        prompts = self.prompts if share_prompts else self.samples
        return prompts * self.prompt_tokens + self.total_response_tokens


def work_of(config: Config, prompt_tokens: float | None = None, response_tokens: float | None = None) -> Work:
    """The workload of one step of `config`.

    Args:
        prompt_tokens, response_tokens: mean lengths; by default the longest that the config allows.
    """
    longest = config.rollout.max_new_tokens
    return Work(
        prompts=config.ppo.prompts_per_step,
        samples_per_prompt=config.ppo.samples_per_prompt,
        prompt_tokens=prompt_tokens or config.model.max_tokens - longest,
        response_tokens=response_tokens or longest,
        longest_response=longest,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The inputs of an estimate.

    Attributes:
        policy: shape of the policy, of the reference and, except for its head, of the critic.
        reward: shape of the reward model; None: no reward model runs here.
        device: the kind of device that all roles use.
        work: the workload of one step.
        nodes: number of machines; the devices are spread evenly over them.
    """

    config: Config
    policy: Shape
    reward: Shape | None
    device: Device
    work: Work
    nodes: int = 1

    @property
    def dtype(self) -> str:
        """Of the weights: "float32" or "bfloat16"."""
        return self.config.model.dtype

    @property
    def has_critic(self) -> bool:
        """Whether the learners train a critic."""
        return self.config.ppo.algorithm == "ppo"


def apply(case: Case, settings: Settings) -> Case:
    """The case with changed settings."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    changed = {name: replace(getattr(case.config, name), **values) for name, values in sections.items()}
    return replace(case, config=replace(case.config, **changed))
