"""One optimizer step of PPO: micro-batches whose losses add up to one mean over the minibatch's tokens."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metaalign_rl.learner.batch import Batch, Inputs, MicroBatch
from metaalign_rl.learner.config import LearnerConfig
from metaalign_rl.learner.openrlhf_modules import openrlhf_module


class PPOUpdate:
    """Clipped policy loss, entropy bonus and value loss by OpenRLHF, on DeepSpeed engines.

    Losses are means over all response tokens of the minibatch, on all ranks: each micro-batch's sum is
    divided by the whole count, and times the ranks since DeepSpeed averages gradients over them.
    """

    def __init__(
        self, config: LearnerConfig, policy: Any, critic: Any | None, ranks: int, device: torch.device
    ) -> None:
        losses = openrlhf_module("models.loss")
        correction: dict[str, Any] = {}
        if config.importance_cap is not None:
            correction = {"is_correction_level": "token", "is_correction_mode": "clip"}
            correction["is_correction_threshold"] = (0.0, config.importance_cap)
        self._policy_loss = losses.PolicyLoss(config.clip_low, config.clip_high, config.dual_clip, **correction)
        self._value_loss = losses.ValueLoss(config.value_clip)
        self._entropy_coef, self._share_prompts = config.entropy_coef, config.share_prompts
        self._policy, self._critic, self._ranks, self._device = policy, critic, ranks, device

    def __call__(self, batch: Batch, plan: list[MicroBatch], tokens: int) -> dict[str, float]:
        """Take one optimizer step.

        Args:
            plan: this rank's micro-batches of the minibatch.
            tokens: response tokens of the minibatch on all ranks.

        Returns:
            Metrics over all ranks, as `Learner.train` explains.
        """
        means: dict[str, Tensor] = {}
        for number, micro in enumerate(plan, start=1):
            part = batch.select(micro.indices)
            inputs = part.inputs(share_prompts=self._share_prompts).to(self._device)
            part = part.to(self._device)
            weight, last = float(not micro.filler), number == len(plan)
            for engine, term in ((self._policy, self._policy_term), (self._critic, self._value_term)):
                if engine is None:
                    continue
                loss, shares = term(part, inputs, tokens)
                engine.set_gradient_accumulation_boundary(last)
                engine.backward(loss * weight)
                for name, share in shares.items():
                    means[name] = means.get(name, 0.0) + share.detach() * weight
        metrics = self._over_ranks(means)
        metrics["grad_norm"] = _step(self._policy)
        if self._critic is not None:
            metrics["critic_grad_norm"] = _step(self._critic)
        return metrics

    def _policy_term(self, part: Batch, inputs: Inputs, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's loss, and what it adds to the minibatch's means."""
        mask = part.action_mask
        assert part.logprobs is not None and part.advantages is not None
        logprobs, entropy = self._policy(inputs, entropy=True, entropy_gradient=self._entropy_coef != 0)
        loss, clip_ratio, kl, *_ = self._policy_loss(
            logprobs,
            part.logprobs[mask],
            part.advantages[mask],
            torch.ones_like(logprobs),
            rollout_log_probs=None if part.rollout_logprobs is None else part.rollout_logprobs[mask],
            dp_size=self._ranks,
            batch_num_tokens=tokens,
        )
        share = len(logprobs) / tokens
        shares = {
            "policy_loss": loss / self._ranks,
            "clip_ratio": clip_ratio * share,
            "approx_kl": kl * share,
            "entropy": entropy.sum() / tokens,
        }
        if self._entropy_coef != 0:
            loss = loss - self._entropy_coef * entropy.sum() / tokens * self._ranks
        return loss, shares

    def _value_term(self, part: Batch, inputs: Inputs, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        mask = part.action_mask
        assert self._critic is not None and part.values is not None and part.returns is not None
        values = self._critic(inputs)
        loss = self._value_loss(
            values,
            part.values[mask],
            part.returns[mask],
            torch.ones_like(values),
            dp_size=self._ranks,
            batch_num_tokens=tokens,
        )
        return loss, {"value_loss": loss / self._ranks}

    def _over_ranks(self, means: dict[str, Tensor]) -> dict[str, float]:
        values = torch.stack(list(means.values()))
        if self._ranks > 1:
            dist.all_reduce(values)
        return dict(zip(means, values.tolist(), strict=True))


def _step(engine: Any) -> float:
    """Take the optimizer step; the gradient's norm before clipping."""
    # Without ZeRO, DeepSpeed keeps no norm.
    norm = None if engine.zero_optimization() else _gradient_norm(engine.module)
    engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)


def _gradient_norm(module: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients)


def explained_variance(batch: Batch) -> float:
    """1 - Var(returns - values) / Var(returns) over response tokens; 0 where the returns do not vary."""
    assert batch.returns is not None and batch.values is not None
    returns, values = batch.returns[batch.action_mask], batch.values[batch.action_mask]
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else 0.0
