"""Whether each engine sampled from the weights that it should have.

The learner and the engine compute the log-probability of the same tokens. Rounding makes the two differ, in bfloat16
by some hundredths of a nat per token. If the engine's weights are stale or were loaded wrongly, they differ by more.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Batch, Rollout
from metaalign_rl.weights import StaleEngine, assert_fresh

CERTAIN = 4.0  # standard errors by which a mismatch must exceed its limit, since a step has few samples
FEW_TOKENS = 32
ROUNDING = {"float32": 1e-3, "bfloat16": 1e-2}  # nats per token; less than this never stops a run


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far engine and learner are apart on some samples.

    Rounding moves the log-probability of a token in proportion to 1 - p: a certain token stays certain. So `rate` does
    not change when training makes the policy more or less certain, and `mean` does. For SmolLM2-135M in bfloat16 the
    rate was 0.07 to 0.08 for tokens with p up to 0.9, and 0.13 at most.

    Attributes:
        mean: |Δ log p| per token, nats.
        uncertainty: 1 - p per token, by the learner.
        error: standard error of `mean` at this uncertainty; infinite for less than `FEW_TOKENS` tokens.
    """

    mean: float
    uncertainty: float
    error: float

    @property
    def rate(self) -> float:
        """Nats per unit of uncertainty."""
        return self.mean / max(self.uncertainty, 1e-6)

    @classmethod
    def of(cls, batch: Batch, rows: Sequence[int]) -> "Deviation":
        """The deviation on the samples at `rows` of an evaluated batch."""
        assert batch.rollout_logprobs is not None and batch.logprobs is not None
        mask = batch.action_mask[rows]
        engine, learner = batch.rollout_logprobs[rows][mask].double(), batch.logprobs[rows][mask].double()
        gaps, unsure = (engine - learner).abs(), -torch.expm1(learner.clamp(max=0.0))
        return cls(float(gaps.mean()), float(unsure.mean()), _error(gaps, unsure))


def _error(gaps: Tensor, unsure: Tensor) -> float:
    """Standard error of the mean of `gaps` as a ratio to the mean of `unsure` (Cochran 1977, section 6.3)."""
    if len(gaps) < FEW_TOKENS:
        return math.inf
    rate = gaps.sum() / unsure.sum().clamp(min=1e-6)
    return float((gaps - rate * unsure).square().mean().sqrt()) / math.sqrt(len(gaps))


class MismatchGuard:
    """Stops a run when an engine samples from other weights than it should.

    An engine is compared with

    - the run's first step, in which all weights are those of version 0, so that only rounding separates the two sides,
    - the other engines in the same step,
    - the fixed limit `config.max_mismatch`, in case the engine was wrong from the start.

    With `ppo.staleness=1`, the policy has moved since the samples were drawn, and the learner no longer has the weights
    that drew them. Then only the comparison with the other engines is left after the first step.

    Attributes:
        baseline: nats per unit of uncertainty in the first step; None before it. Saved in checkpoints.
    """

    def __init__(self, config: Config, baseline: float | None = None) -> None:
        self._config, self.baseline = config, baseline

    def check(self, batch: Batch, rollouts: Sequence[Rollout], version: int) -> float:
        """The mismatch of the worst engine: its mean |Δ log p| per token, in nats.

        Args:
            batch: its rows are the rollouts; `logprobs` are the learner's own.
            version: version of the learners' weights.

        Raises:
            StaleEngine: an engine sampled from another version, or its mismatch is above its limit.
        """
        self.check_versions(rollouts, version)
        is_first, moved = self.baseline is None, self._config.ppo.staleness > 0
        growth = self._config.ppo.max_mismatch_growth
        worst = 0.0
        for drawn, rows in _by_version(rollouts):
            for engine, own in rows.items():
                found = Deviation.of(batch, own)
                others = [row for other, its in rows.items() if other != engine for row in its]
                # Between engines there is only chance; a run may also change since its first step.
                rates = [Deviation.of(batch, others).rate * (1 + growth) / 2] if others else []
                if self.baseline is not None and not moved:
                    rates.append(self.baseline * growth)
                limit = self._limit(found, rates, is_fixed=is_first or not moved)
                assert_fresh(found.mean, limit, drawn, f"rollout engine {engine}")
                worst = max(worst, found.mean)
        if is_first:
            self.baseline = Deviation.of(batch, range(len(rollouts))).rate
        return worst

    def check_versions(self, rollouts: Sequence[Rollout], current: int) -> None:
        """Check the versions of the weights that the engines say they sampled from.

        Raises:
            StaleEngine: one is not among the last `ppo.staleness` + 1 versions up to `current`.
        """
        oldest = current - self._config.ppo.staleness
        for engine, version in sorted({(r.sample.engine, r.sample.weight_version) for r in rollouts}):
            if not oldest <= version <= current:
                allowed = f"{oldest} to {current}" if oldest < current else f"{current}"
                raise StaleEngine(
                    f"rollout engine {engine} sampled from weight version {version}, expected version {allowed}"
                )

    def _limit(self, found: Deviation, rates: Iterable[float], *, is_fixed: bool) -> float:
        """The limit of an engine's mean: the lowest of the highest `rates`, plus its chance error."""
        fixed = self._config.max_mismatch if is_fixed else math.inf
        limits = [rate * found.uncertainty + CERTAIN * found.error for rate in rates]
        return min(fixed, max(ROUNDING[self._config.model.dtype], min(limits, default=math.inf)))


def _by_version(rollouts: Sequence[Rollout]) -> list[tuple[int, dict[int, list[int]]]]:
    """By version of the weights that drew the last token, the rows of each engine."""
    found: dict[int, dict[int, list[int]]] = {}
    for row, rollout in enumerate(rollouts):
        by_engine = found.setdefault(rollout.sample.weight_version, {})
        by_engine.setdefault(rollout.sample.engine, []).append(row)
    return sorted(found.items())
