"""Selects the rows that a step rolls out, and so the tiers by whose preferences its responses are judged."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import RELATIONS, TIERS, Row
from metaalign_rl.core.errors import UserError, nearest
from metaalign_rl.core.meta_prompt import encode_row
from metaalign_rl.data.flips import can_flip, swap


def encode_prompts(config: Config, rows: Sequence[Row], tokenizer: Any) -> list[list[int]]:
    """The rows' token ids, with room for a response.

    Raises:
        UserError: a row's meta-prompt does not fit in `model.max_tokens`.
    """
    max_tokens = config.model.max_tokens - config.rollout.max_new_tokens
    return [encode_row(tokenizer, row, max_tokens=max_tokens) for row in rows]


class PromptSource:
    """The run's rows, tokenized, and the choice of each step's rows.

    Rows are tokenized once, at construction, so that a row that does not fit is an error before training begins.

    Raises:
        UserError: a row's meta-prompt does not fit in `model.max_tokens`, or `ppo.sampler` has an unknown group.
    """

    def __init__(self, config: Config, rows: Sequence[Row], tokenizer: Any) -> None:
        conflicts = [index for index, row in enumerate(rows) if can_flip(row)] if config.ppo.flips else []
        flips = {index: len(rows) + place for place, index in enumerate(conflicts)}
        self.rows = [*rows, *(swap(rows[index]) for index in conflicts)]
        self._prompts = encode_prompts(config, self.rows, tokenizer)
        self._sampler = PromptSampler(rows, config.ppo.sampler, config.run.seed, flips)
        self._count = config.ppo.prompts_per_step

    def draw(self, step: int) -> tuple[list[Row], list[list[int]]]:
        """The `ppo.prompts_per_step` rows of a step, and their token ids."""
        indices = self._sampler.draw(step, self._count)
        return [self.rows[index] for index in indices], [self._prompts[index] for index in indices]


class Passes:
    """Rows in random order, pass after pass: every row once before any row a second time.

    Args:
        rows: the rows' indices.
        seed: of the order; each pass has its own.
    """

    def __init__(self, rows: Sequence[int], seed: str) -> None:
        self._rows, self._seed = rows, seed
        self._orders: dict[int, list[int]] = {}  # by pass; the last two

    def take(self, start: int, count: int) -> list[int]:
        """The rows at the places from `start` on. Place 0 begins the first pass."""
        size = len(self._rows)
        return [self._order(place // size)[place % size] for place in range(start, start + count)]

    def _order(self, number: int) -> list[int]:
        if number not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if known == number - 1}
            self._orders[number] = random.Random(f"{self._seed} {number}").sample(self._rows, len(self._rows))
        return self._orders[number]


class PromptSampler:
    """Draws each step's rows. With weights: the governing tier and the relation by weight, then rows of that group.

    The rows of a group, or without weights all rows, come in passes: each row once, in random order, before any row a
    second time. Only a step in which one pass ends and the next begins may draw a row twice.

    A draw depends only on the seed and the step, so a resumed run draws the same rows.

    Args:
        weights: by governing tier (`"system"`) or tier and relation (`"system/conflict"`). If there are any, only
            groups with a weight are drawn: `{"system": 2}` draws rows of the system tier alone. A tier's weight is its
            share of the draws, relative to the other weights; it is split over the tier's relations in proportion to
            their rows. A weight for a tier and relation replaces the tier's for these rows.
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
        found = {name: self._weight(name, weights) for name in self._groups} if weights else {"all": 1.0}
        if not any(weight > 0 for weight in found.values()):
            raise UserError(f"ppo.sampler: no row is left to draw; give a weight to one of {', '.join(self._groups)}")
        self._weights, self._seed, self._flips = found, seed, flips or {}
        groups = self._groups if weights else {"all": list(range(len(rows)))}
        self._passes = {name: Passes(groups[name], f"{seed} {name}") for name in found}
        self._drawn: list[dict[str, int]] = [dict.fromkeys(found, 0)]  # by step: rows of each group drawn before it

    def draw(self, step: int, count: int) -> list[int]:
        """The indices of `count` rows for a step. All steps must have the same count."""
        while len(self._drawn) <= step + 1:
            before, more = self._drawn[-1], self._choose(len(self._drawn) - 1, count)
            self._drawn.append({name: before[name] + more[name] for name in before})
        before, after = self._drawn[step : step + 2]
        wanted = {name: after[name] - before[name] for name in before}
        assert sum(wanted.values()) == count, "steps of different sizes"
        drawn = self._with_flips(
            [row for name in wanted for row in self._passes[name].take(before[name], wanted[name])]
        )
        random.Random(f"{self._seed} {step} order").shuffle(drawn)
        return drawn

    def _choose(self, step: int, count: int) -> Counter[str]:
        """How many rows of each group a step draws."""
        names = random.Random(f"{self._seed} {step}").choices(
            list(self._weights), list(self._weights.values()), k=count
        )
        return Counter(names)

    def _with_flips(self, drawn: list[int]) -> list[int]:
        flippable = [index for index in drawn if index in self._flips]
        kept = flippable[: (len(flippable) + 1) // 2]
        flipped = [self._flips[index] for index in kept][: len(flippable) // 2]
        return [index for index in drawn if index not in self._flips] + kept + flipped

    def _weight(self, name: str, weights: Mapping[str, float]) -> float:
        """A group's weight."""
        size, tier = len(self._groups[name]), name.partition("/")[0]
        if name in weights:
            return weights[name]
        if tier in weights:
            return (
                weights[tier] * size / sum(len(g) for other, g in self._groups.items() if other.startswith(f"{tier}/"))
            )
        return 0.0
