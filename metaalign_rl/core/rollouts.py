"""What goes into a rollout engine and what comes out. Light: no torch, no vLLM."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be answered once.

    Attributes:
        index: the caller's number for it, returned with the sample; several requests may share one.
        prompt_ids: the prompt's tokens, special tokens included.
        seed: makes this sample independent of the engine's own random state; see `RolloutEngine.generate`.
    """

    index: int
    prompt_ids: list[int]
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn: from the model's whole distribution at `temperature`; 0 is greedy."""

    temperature: float = 1.0
    max_new_tokens: int = 32


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer.

    Attributes:
        index: the request's.
        prompt_ids: the request's.
        response_ids: the answer's tokens, the end token included where the model ended by itself.
        logprobs: the engine's log-probability of each response token, in nats, under the model's own
            distribution (temperature 1), whatever temperature it was drawn at.
        text: the answer decoded, without special tokens.
        finished: the model ended by itself; False: cut at `max_new_tokens`.
        weight_version: of the weights that drew its last token.
        engine: the number of the engine that drew it, from 0.
        first_version: of the weights that drew its first token; older where new weights came meanwhile.
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
