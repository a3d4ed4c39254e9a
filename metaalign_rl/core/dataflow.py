"""The data types of a run, in the order in which they appear. Imports no heavy packages.

Row ─> Request ─> Sample ─┬─> Reward ─┬─> Rollout ─> Batch ─> one optimizer step
data   prompt     vLLM    │  scoring  │   one per    many rollouts
       tokens             └───────────┘   response   as tensors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Tier = Literal["system", "user", "dialog"]
TIERS: tuple[Tier, ...] = ("system", "user", "dialog")  # by falling priority
LABELS = (*TIERS, "overall")  # the reward model's outputs, in this order
FAMILIES = ("priority", "helpful", "consensus", "diverse_opinion")
RELATIONS = ("system_only", "user_only", "agree", "conflict", "distractor", "neutral")
ANSWERS = ("response", "chosen", "rejected")

Metrics: TypeAlias = dict[str, float]
"""Named numbers of one step, such as `{"reward": 0.61, "tier/user/kl": 0.012}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One meta-prompt with its dialog and, depending on use, responses to it. `metaalign_rl.core.rows` reads them.

    Example:
        >>> row = Row(
        ...     id="w-17", family="priority", relation="conflict", tier="system",
        ...     system_info="always write in capitals.", user_info="please write in lower case.",
        ...     messages=[{"role": "user", "content": "what is the capital of france?"}],
        ...     checks={"system": {"name": "upper_case"}, "user": {"name": "lower_case"}},
        ... )

    Attributes:
        tier: the governing tier, whose preference a response is judged by. It is `dialog` if no tier has a preference.
        messages: the dialog, `{"role": "user" | "assistant", "content": text}` each, ending with the user.
        response: a demonstration (SFT), or the response to be scored.
        chosen, rejected: a pair for the reward model.
        strength: how much better the chosen response is, from 0 (slightly) to 1, if the data states it.
        checks: the gold check of each tier, `{"name": registered check, ...its arguments}`.
        labels: absolute labels, by response field and label, `{"chosen": {"system": True, "overall": True}}`.
        tags: free-form text for reports, such as `{"kind": "case", "split": "paraphrase"}`.
    """

    id: str
    family: str
    relation: str
    tier: Tier
    system_info: str
    user_info: str
    messages: list[dict[str, str]]
    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    strength: float | None = None
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: dict[str, dict[str, bool]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object, without empty fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None and value != {}}


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, for which a rollout engine generates one response.

    Example:
        >>> Request(index=5, prompt_ids=[1, 17, 23, 4])

    Attributes:
        index: the caller's number for the request. The sample returns it. Requests 0 to 3 are the four responses
            to a step's first prompt if `ppo.samples_per_prompt` is 4.
        prompt_ids: the prompt's tokens, special tokens included.
        seed: makes this sample independent of the engine's own random state; see `RolloutEngine.generate`.
    """

    index: int
    prompt_ids: list[int]
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are sampled: from the model's distribution at `temperature`; 0 is greedy.

    Example:
        >>> Sampling(temperature=0.0, max_new_tokens=64)

    Attributes:
        top_p: sample from the most likely tokens that together have this probability.
        stop: texts that end a response. The response's text ends before them; its tokens include them.
        min_new_tokens: the end token is not sampled before this many tokens.
    """

    temperature: float = 1.0
    max_new_tokens: int = 32
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One response from a rollout engine.

    Example:
        >>> Sample(
        ...     index=5, prompt_ids=[1, 17, 23, 4], response_ids=[9, 2], logprobs=[-0.4, -0.01], text="paris",
        ...     finished=True, weight_version=12, engine=1, first_version=12,
        ... )

    Attributes:
        index: as in the request.
        prompt_ids: as in the request.
        response_ids: the response's tokens, including the end token if the model ended the response.
        logprobs: the engine's log-probability of each response token, in nats, under the model's full distribution at
            the temperature that the engine was started with, 1 by default.
        text: the response decoded, without special tokens, without the stop text that ended it and without reasoning
            (`<think>…</think>`).
        finished: True if the model ended the response with its end token or a stop text, False if it was truncated at
            `max_new_tokens`.
        weight_version: version of the weights that sampled the last token.
        engine: index of the engine, from 0.
        first_version: version of the weights that sampled the first token; older if new weights arrived in between.
        retokenized: whether `text` has other tokens than `response_ids` when it is encoded again. The reward model
            reads the tokens of `text`.
    """

    index: int
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    text: str
    finished: bool
    weight_version: int
    engine: int = 0
    first_version: int = 0
    retokenized: bool = False


@dataclass(frozen=True, slots=True)
class Ending:
    """How a response ended.

    Attributes:
        finished: as in `Sample`.
        tokens: number of its tokens, including the end token.
    """

    finished: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class Reward:
    """The reward of one response, with its parts.

    Example:
        >>> Reward(
        ...     value=0.83, proxy=0.83, gold=True,
        ...     probabilities={"system": 0.97, "user": 0.04, "dialog": 0.91, "overall": 0.83},
        ...     passes={"system": True, "user": False, "dialog": True}, terms={"model": 0.83},
        ... )

    Attributes:
        value: the reward that PPO maximizes: the weighted mean of the reward terms, clipped, less the penalty.
        proxy: the reward model's probability that the response is good, in the configured mode; None without a model.
        gold: whether the row's checks pass; None without a check of the governing tier.
        probabilities: the reward model's four probabilities by label; empty without a model.
        passes: whether a tier's check passes, for the tiers that have a check.
        terms: value of each reward term, before weighting; see `metaalign_rl.scoring.terms`.
        penalty: what was subtracted for the response's length; see `metaalign_rl.scoring.shaping`.
    """

    value: float
    proxy: float | None
    gold: bool | None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    passes: Mapping[str, bool] = field(default_factory=dict)
    terms: Mapping[str, float] = field(default_factory=dict)
    penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response with the row that asked for it and its reward.

    Example:
        >>> Rollout(row, sample, reward).reward.value
        0.83
    """

    row: Row
    sample: Sample
    reward: Reward


@dataclass(slots=True)
class Batch:
    """Prompts with their responses, right-padded. `metaalign_rl.learner.batch` builds and splits them.

    Column t of a [B, T-1] tensor is about token t+1: entry [b, t] of `logprobs` is log p(token t+1 | tokens 0..t).

    Example: the prompt (5, 6) with the response (7, 2), and the prompt (5) with the response (2); padding is 0.
        >>> batch.sequences
        tensor([[5, 6, 7, 2],
                [5, 2, 0, 0]])
        >>> batch.action_mask
        tensor([[False,  True,  True],
                [ True, False, False]])

    Attributes:
        sequences: [B, T] token ids, prompt then response.
        attention_mask: [B, T], True at tokens that are not padding.
        action_mask: [B, T-1], True where token t+1 belongs to the response.
        rollout_logprobs: [B, T-1], from the rollout engine.
        logprobs, ref_logprobs, values: [B, T-1] from `Learner.evaluate`, 0 outside the action mask.
        advantages, returns: [B, T-1], the targets of `Learner.train`.
    """

    sequences: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    rollout_logprobs: Tensor | None = None
    logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    def lengths(self) -> list[int]:
        """Number of tokens of each sample, without padding."""
        return self.attention_mask.sum(dim=1).tolist()

    def prompt_lengths(self) -> list[int]:
        """Number of prompt tokens of each sample."""
        return (self.action_mask.long().argmax(dim=1) + 1).tolist()

    def response_tokens(self) -> int:
        """Number of response tokens in the batch."""
        return int(self.action_mask.sum())

    def select(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`, in that order, with no more columns than the longest needs."""
        rows = list(indices)
        longest = int(self.attention_mask[rows].sum(dim=1).max()) if rows else 1

        def cut(tensor: Tensor | None, width: int) -> Tensor | None:
            return None if tensor is None else tensor[rows, :width]

        return Batch(**{f.name: cut(getattr(self, f.name), self.width_of(f.name, longest)) for f in fields(self)})

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in tensors))

    @staticmethod
    def width_of(name: str, tokens: int) -> int:
        """Columns of the field `name` for sequences of `tokens` tokens."""
        return tokens if name in ("sequences", "attention_mask") else tokens - 1
