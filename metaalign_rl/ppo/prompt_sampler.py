"""Selects the rows that a step rolls out, and so the tiers by whose preferences its responses are judged."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import RELATIONS, TIERS, Row
from metaalign_rl.core.errors import UserError, nearest
from metaalign_rl.core.meta_prompt import encode_row
from metaalign_rl.data.flips import can_flip, swap


class PromptSource:
    """The run's rows, tokenized, and the choice of each step's rows.

    Rows are tokenized once, at construction, so that a row that does not fit is an error before training begins.

    Raises:
        UserError: a row's meta-prompt does not fit in `model.max_tokens`, or `ppo.sampler` has an unknown group.
    """

    def __init__(self, config: Config, rows: Sequence[Row], tokenizer: Any) -> None:
        conflicts = [index for index, row in enumerate(rows) if can_flip(row)] if config.ppo.flips else []
        flips = {index: len(rows) + place for place, index in enumerate(conflicts)}
        max_tokens = config.model.max_tokens - config.rollout.max_new_tokens
        self.rows = [*rows, *(swap(rows[index]) for index in conflicts)]
        self._prompts = [encode_row(tokenizer, row, max_tokens=max_tokens) for row in self.rows]
        self._sampler = PromptSampler(rows, config.ppo.sampler, config.run.seed, flips)
        self._count = config.ppo.prompts_per_step

    def draw(self, step: int) -> tuple[list[Row], list[list[int]]]:
        """The `ppo.prompts_per_step` rows of a step, and their token ids."""
        indices = self._sampler.draw(step, self._count)
        return [self.rows[index] for index in indices], [self._prompts[index] for index in indices]


class PromptSampler:
    """Draws each step's rows: the governing tier and the relation by weight, then a row of that group.

    A draw depends only on the seed and the step, so a resumed run draws the same rows.

    Args:
        weights: by governing tier (`"system"`) or tier and relation (`"system/conflict"`). A group without a weight
            is never drawn; without any weights, every row is equally likely.
        flips: index of a row -> index of its flip. The flip takes the place of another such row of the step, so both
            sides of a flip are rolled out together.

    Raises:
        UserError: a weight for an unknown tier or relation, or weights that leave no row to draw.
    """

    def __init__(
        self, rows: Sequence[Row], weights: Mapping[str, float], seed: int, flips: Mapping[int, int] | None = None
    ) -> None:
        self._groups: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            self._groups.setdefault(f"{row.tier}/{row.relation}", []).append(index)
        known = {*TIERS, *(f"{tier}/{relation}" for tier in TIERS for relation in RELATIONS)}
        for name in weights:
            if name not in known:
                raise UserError(f"ppo.sampler: unknown group {name!r}; {nearest(name, known)}")
        self._weights = [self._weight(name, weights) for name in self._groups]
        if not any(weight > 0 for weight in self._weights):
            raise UserError(f"ppo.sampler: no row is left to draw; give a weight to one of {', '.join(self._groups)}")
        self._seed, self._flips = seed, flips or {}

    def draw(self, step: int, count: int) -> list[int]:
        """The indices of `count` rows for a step. A row repeats only after all rows of its group were drawn."""
        rng = random.Random(f"{self._seed} {step}")
        names = rng.choices(list(self._groups), self._weights, k=count)
        drawn = []
        for name in self._groups:
            group, wanted = self._groups[name], names.count(name)
            whole, rest = divmod(wanted, len(group))
            drawn += group * whole + rng.sample(group, rest)
        drawn = self._with_flips(drawn)
        rng.shuffle(drawn)
        return drawn

    def _with_flips(self, drawn: list[int]) -> list[int]:
        flippable = [index for index in drawn if index in self._flips]
        kept = flippable[: (len(flippable) + 1) // 2]
        flipped = [self._flips[index] for index in kept][: len(flippable) // 2]
        return [index for index in drawn if index not in self._flips] + kept + flipped

    def _weight(self, name: str, weights: Mapping[str, float]) -> float:
        """A group's weight. A tier's weight is split over its groups in proportion to their rows."""
        size, tier = len(self._groups[name]), name.partition("/")[0]
        if name in weights:
            return weights[name]
        if tier in weights:
            return (
                weights[tier] * size / sum(len(g) for other, g in self._groups.items() if other.startswith(f"{tier}/"))
            )
        return float(size) if not weights else 0.0
