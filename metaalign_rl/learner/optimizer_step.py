"""One optimizer step: the losses of its micro-batches add up to one mean over the minibatch."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.core.dataflow import Batch
from metaalign_rl.learner.divergence import REMEDY, Diverged, DivergenceMonitor
from metaalign_rl.learner.losses import Penalty, PolicyObjective, Scale, Terms, ValueObjective, spread
from metaalign_rl.learner.micro_batches import Inputs, MicroBatch, model_inputs


class OptimizerStep:
    """Takes optimizer steps on DeepSpeed engines.

    Every micro-batch is weighted by its share of the minibatch, so the split over passes and ranks changes only the
    rounding.

    Attributes:
        logprobs: [B, T-1]; if set, a step fills in the log-probabilities that this rank's losses are computed from.
    """

    def __init__(
        self, config: LearnerConfig, policy: Any, critic: Any | None, ranks: int, device: torch.device
    ) -> None:
        self._policy_loss, self._value_loss = PolicyObjective(config), ValueObjective(config)
        self._entropy_gradient, self._share_prompts = config.entropy_coef != 0, config.share_prompts
        self._engines = {"": policy} | ({} if critic is None else {"critic_": critic})
        self._policy, self._critic, self._ranks, self._device = policy, critic, ranks, device
        self.monitor = DivergenceMonitor(config.spike_limit)
        self.logprobs: Tensor | None = None

    def __call__(
        self,
        batch: Batch,
        plan: list[MicroBatch],
        tokens: int,
        samples: int,
        penalty: Penalty,
        where: str,
        critic_only: bool = False,
    ) -> dict[str, float]:
        """Take one optimizer step.

        Args:
            plan: this rank's micro-batches.
            tokens, samples: response tokens and samples of the minibatch on all ranks.
            where: the minibatch's name in errors.
            critic_only: leave the policy as it is.

        Returns:
            Metrics over all ranks; see `Learner.train`.

        Raises:
            Diverged: on all ranks, before the step is taken.
        """
        scale = Scale(tokens, samples, self._ranks)
        engines = {name: engine for name, engine in self._engines.items() if name or not critic_only}
        terms = {"": self._policy_term, "critic_": self._value_term}
        means: dict[str, Tensor] = {}
        for number, micro in enumerate(plan, start=1):
            part = batch.select(micro.indices)
            inputs = model_inputs(part, share_prompts=self._share_prompts).to(self._device)
            part = part.to(self._device)
            for model, engine in engines.items():
                loss, shares = terms[model](micro, part, inputs, scale, penalty)
                engine.set_gradient_accumulation_boundary(number == len(plan))
                engine.backward(loss * (not micro.filler))
                for name, share in shares.items():
                    means[name] = means.get(name, 0.0) + share.detach() * (not micro.filler)
        metrics = self._over_ranks(means)
        self.monitor.check(metrics, where)  # before the gradients, which are computed from these losses
        norms = {f"{name}grad_norm": gradient_norm(engine) for name, engine in engines.items()}
        self.monitor.check(norms, where)
        for name, engine in engines.items():
            engine.step()
            if not engine.was_step_applied():  # DeepSpeed drops a step without an error
                who = "critic" if name else "policy"
                raise Diverged(f"{where}: DeepSpeed dropped the step of the {who}, its gradient overflows; {REMEDY}")
        return metrics | norms

    def _policy_term(self, micro: MicroBatch, part: Batch, inputs: Inputs, scale: Scale, penalty: Penalty) -> Terms:
        found, entropy = self._policy(inputs, entropy=True, entropy_gradient=self._entropy_gradient)
        logprobs = spread(found, part.action_mask)
        if self.logprobs is not None and not micro.filler:
            self.logprobs[micro.indices, : logprobs.shape[1]] = logprobs.detach()
        return self._policy_loss(logprobs, entropy, part, scale, penalty)

    def _value_term(self, micro: MicroBatch, part: Batch, inputs: Inputs, scale: Scale, penalty: Penalty) -> Terms:
        assert self._critic is not None
        return self._value_loss(spread(self._critic(inputs), part.action_mask), part, scale)

    def _over_ranks(self, means: dict[str, Tensor]) -> dict[str, float]:
        values = torch.stack(list(means.values()))
        if self._ranks > 1:
            dist.all_reduce(values)
        return dict(zip(means, values.tolist(), strict=True))


def gradient_norm(engine: Any) -> float:
    """The gradient's norm over all ranks, before clipping and the step. DeepSpeed reports it only after the step.

    Infinite if any gradient is not finite. DeepSpeed masks the norm of such a parameter group as -1, so the groups are
    checked before they are combined.
    """
    norms = torch.stack([torch.as_tensor(norm, dtype=torch.float32) for norm in _group_norms(engine)])
    broken = (norms < 0) | ~torch.isfinite(norms)
    return float(torch.linalg.vector_norm(norms.masked_fill(broken, math.inf)))


def _group_norms(engine: Any) -> list[Any]:
    """The norm of each parameter group. Under ZeRO 1 and 2, as `scaled_global_norm` of DeepSpeed has them."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        return [nn.utils.get_total_norm(gradients)]
    if stage == 3:
        norms: list[Any] = optimizer._get_norm_groups()
        return norms
    groups = optimizer.params_in_partition
    if optimizer.cpu_offload:
        return [optimizer.complete_grad_norm_calculation_for_cpu_offload(group) for group in groups]
    return [optimizer.get_grad_norm_direct(optimizer.averaged_gradients[i], group) for i, group in enumerate(groups)]


def explained_variance(batch: Batch) -> float:
    """1 - Var(returns - values) / Var(returns) over response tokens; 0 if the returns do not vary."""
    assert batch.returns is not None and batch.values is not None
    returns, values = batch.returns[batch.action_mask], batch.values[batch.action_mask]
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else 0.0
