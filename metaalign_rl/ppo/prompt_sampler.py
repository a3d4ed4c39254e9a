"""The tier sampler: which rows a step rolls out, and so by which tier's preference answers are judged."""

import random
from collections.abc import Mapping, Sequence

from metaalign_rl.core.dataflow import RELATIONS, TIERS, Row
from metaalign_rl.core.errors import UserError, nearest


class PromptSampler:
    """Draws each step's rows: first the governing tier and the relation, by weight, then a row of that group.

    A step's draw depends on the seed and the step alone, so a resumed run goes on with the same rows.

    Args:
        weights: by governing tier (`"system"`) or tier and relation (`"system/conflict"`); a group that neither names
            has weight 1 each row, so without weights every row is as likely as any other.
        flips: by row its flip's index, which then takes the place of another such row of the step, so that both sides
            of the flip are rolled out together.

    Raises:
        UserError: a weight for no tier or relation, or weights that leave nothing to draw.
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
            raise UserError(f"ppo.sampler: no row is left to draw; the rows' groups: {', '.join(self._groups)}")
        self._seed, self._flips = seed, flips or {}

    def draw(self, step: int, count: int) -> list[int]:
        """The indices of `count` rows for a step; a row comes twice only when its group is used up."""
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
        """A group's weight; a tier's weight is shared by its groups as their rows are."""
        size, tier = len(self._groups[name]), name.partition("/")[0]
        if name in weights:
            return weights[name]
        if tier in weights:
            return (
                weights[tier] * size / sum(len(g) for other, g in self._groups.items() if other.startswith(f"{tier}/"))
            )
        return float(size) if not weights else 0.0
