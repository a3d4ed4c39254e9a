"""The losses of policy and critic, from OpenRLHF. Tensors are [B, T-1], masked by `Batch.action_mask`."""

from typing import NamedTuple

import torch
from torch import Tensor

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.core.dataflow import Batch
from metaalign_rl.learner.openrlhf_modules import openrlhf_module

LEVELS = {"off": "off", "token": "token", "sequence": "seq"}  # our setting -> OpenRLHF's


class Scale(NamedTuple):
    """The divisor of a micro-batch's sums: response tokens and samples of its minibatch on all ranks.

    Losses are multiplied by the number of ranks, because DeepSpeed averages gradients over ranks.
    """

    tokens: int
    samples: int
    ranks: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of OpenRLHF's losses."""
        return {"batch_num_tokens": self.tokens, "global_batch_size": self.samples, "dp_size": self.ranks}


class Penalty(NamedTuple):
    """The KL term of the loss: coefficient (0: none) and estimator, "k1", "k2" or "k3"."""

    coef: float
    estimator: str


Terms = tuple[Tensor, dict[str, Tensor]]  # a micro-batch's loss, and its share of the minibatch's metrics


class PolicyObjective:
    """The clipped policy loss with off-policy correction, KL term and entropy bonus; docs/ppo.md has the formulas."""

    def __init__(self, config: LearnerConfig) -> None:
        self._losses, self._utils = openrlhf_module("models.loss"), openrlhf_module("models.utils")
        self._by_token, self._by_sequence = config.loss_aggregation == "tokens", config.correction == "sequence"
        self._corrects, self._entropy_coef = config.correction != "off", config.entropy_coef
        self._clipped = self._losses.PolicyLoss(
            config.clip_low,
            config.clip_high,
            config.dual_clip,
            token_level_loss=self._by_token,
            is_correction_level=LEVELS[config.correction],
            is_correction_mode=config.correction_mode,
            is_correction_gating=config.correction_gate,
            is_correction_threshold=config.correction_bounds,
        )

    def __call__(self, logprobs: Tensor, entropy: Tensor, part: Batch, scale: Scale, penalty: Penalty) -> Terms:
        """The loss of a micro-batch.

        Args:
            logprobs: [B, T-1], of the current policy.
            entropy: [N], of the N response tokens.
        """
        assert part.logprobs is not None and part.advantages is not None
        assert part.rollout_logprobs is not None or not self._corrects, "off-policy correction needs rollout_logprobs"
        mask, share = part.action_mask, part.action_mask.sum() / scale.tokens
        policy_loss, clip_ratio, approx_kl, rollout_kl, corrected = self._clipped(
            logprobs, part.logprobs, part.advantages, mask, part.rollout_logprobs, **scale.options()
        )
        mean_entropy = entropy.sum() / scale.tokens
        metrics = {"policy_loss": policy_loss / scale.ranks, "clip_ratio": clip_ratio * share}
        metrics |= {"approx_kl": approx_kl * share, "entropy": mean_entropy}
        if self._corrects:
            of_all = len(part) / scale.samples if self._by_sequence else share
            metrics |= {"rollout_kl": rollout_kl * share, "corrected": corrected * of_all}
        loss: Tensor = policy_loss - self._entropy_coef * mean_entropy * scale.ranks
        if penalty.coef:
            kl = self._kl(logprobs, part, scale, penalty.estimator)
            metrics["kl_loss"] = kl / scale.ranks
            loss = loss + penalty.coef * kl
        return loss, metrics

    def _kl(self, logprobs: Tensor, part: Batch, scale: Scale, estimator: str) -> Tensor:
        # k1 itself has a gradient of mean 0. OpenRLHF's `unbiased_gradient` gives the gradient of the KL instead.
        kl = self._utils.compute_approx_kl(
            logprobs, part.ref_logprobs, part.logprobs, kl_estimator=estimator, unbiased_gradient=estimator == "k1"
        )
        mean: Tensor = self._losses.aggregate_loss(kl, part.action_mask, self._by_token, **scale.options())
        return mean


class ValueObjective:
    """Half the clipped squared error of the values, mean over response tokens."""

    def __init__(self, config: LearnerConfig) -> None:
        self._clipped = openrlhf_module("models.loss").ValueLoss(config.value_clip)

    def __call__(self, values: Tensor, part: Batch, scale: Scale) -> Terms:
        """The loss of a micro-batch."""
        assert part.values is not None and part.returns is not None
        loss = self._clipped(values, part.values, part.returns, part.action_mask, **scale.options())
        return loss, {"value_loss": loss / scale.ranks}


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Spread one value per response token, [N] row by row, over [B, T-1]; 0 elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)
