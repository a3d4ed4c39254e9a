"""What one PPO step has to do: how many answers, how long, by which models."""

from dataclasses import dataclass

from metaalign_rl.config.schema import Config
from metaalign_rl.plan.rates import Device
from metaalign_rl.plan.shape import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One PPO step's answers; lengths are means, in tokens."""

    prompts: int
    samples_per_prompt: int
    prompt_tokens: float
    answer_tokens: float
    longest_answer: int

    @property
    def samples(self) -> int:
        """Answers of a step."""
        return self.prompts * self.samples_per_prompt

    @property
    def length(self) -> float:
        """Tokens of a prompt with its answer."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def answers(self) -> float:
        """Response tokens of a step."""
        return self.samples * self.answer_tokens

    def read(self, share_prompts: bool) -> float:
        """Tokens that a model reads of a step: a prompt once for all its answers where they share it."""
        prompts = self.prompts if share_prompts else self.samples
        return prompts * self.prompt_tokens + self.answers


def work_of(config: Config, prompt_tokens: float | None = None, answer_tokens: float | None = None) -> Work:
    """A step of `config`; lengths that are not given are the longest that it allows."""
    longest = config.rollout.max_new_tokens
    return Work(
        prompts=config.ppo.prompts_per_step,
        samples_per_prompt=config.ppo.samples_per_prompt,
        prompt_tokens=prompt_tokens or config.model.max_tokens - longest,
        answer_tokens=answer_tokens or longest,
        longest_answer=longest,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What an estimate is made of.

    Attributes:
        policy: shape of the policy, the reference and, but for its head, the critic.
        reward: shape of the reward model; None: scored elsewhere, or by checks alone.
        nodes: over which the devices are spread evenly.
    """

    config: Config
    policy: Shape
    reward: Shape | None
    device: Device
    work: Work
    nodes: int = 1

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return self.config.model.dtype

    @property
    def has_critic(self) -> bool:
        """Whether learners train a critic beside the policy."""
        return self.config.ppo.algorithm == "ppo"
