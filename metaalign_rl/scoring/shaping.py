"""What changes a reward after the mean of its terms: a clip, and penalties for the response's length."""

from dataclasses import dataclass

from metaalign_rl.core.dataflow import Ending


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """Clips rewards and computes penalties. The default changes nothing.

    Attributes:
        clip: lowest and highest mean of the terms; None: no clip.
        unfinished: penalty of a response that was truncated.
        overlong: penalty of a response of `max_new_tokens` tokens. It grows linearly over the last `overlong_tokens`
            tokens: the soft overlong punishment of DAPO (arXiv:2503.14476, equation 13).
        overlong_tokens: 0 turns this penalty off.
        max_new_tokens: the limit on a response's tokens.
    """

    clip: tuple[float, float] | None = None
    unfinished: float = 0.0
    overlong: float = 0.0
    overlong_tokens: int = 0
    max_new_tokens: int = 0

    def clipped(self, value: float) -> float:
        """The mean of the terms within the clip's bounds."""
        if self.clip is None:
            return value
        low, high = self.clip
        return min(max(value, low), high)

    def penalty(self, ending: Ending) -> float:
        """What to subtract from the reward of a response that ended so; 0 or more."""
        penalty = 0.0 if ending.finished else self.unfinished
        if self.overlong_tokens:
            excess = ending.tokens - (self.max_new_tokens - self.overlong_tokens)
            penalty += self.overlong * min(max(excess / self.overlong_tokens, 0.0), 1.0)
        return penalty
