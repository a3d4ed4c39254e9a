"""Detect diverged training before it reaches the weights."""

import math
from typing import Any

import torch

from metaalign_rl.core.dataflow import Batch

CHECKED = ("logprobs", "ref_logprobs", "rollout_logprobs", "values", "advantages", "returns")
WATCHED = (
    "grad_norm",
    "critic_grad_norm",
    "value_loss",
)  # never negative. The policy loss is not in it: it is near 0 in healthy training
MEMORY = 0.95  # decay of the running means: about 20 optimizer steps
REMEDY = "resume from the last checkpoint with a lower learner.learning_rate or max_grad_norm, or a higher ppo.kl_coef"


class Diverged(RuntimeError):
    """Training diverged. The optimizer step was not taken."""


def check_batch(batch: Batch, where: str) -> None:
    """Check that a batch's numbers are finite.

    Raises:
        Diverged: they are not; names the tensor and the number of tokens.
    """
    for name in CHECKED:
        tensor = getattr(batch, name)
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise Diverged(f"{where}: {name} are not finite at {bad} of {batch.response_tokens()} tokens; {REMEDY}")


def is_finite(engine: Any) -> bool:
    """Whether this rank's weights and optimizer states of a DeepSpeed engine are finite."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # the one inside of ZeRO's
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    return all(bool(torch.isfinite(tensor.detach()).all()) for tensor in (*weights, *states))


class DivergenceMonitor:
    """Checks each minibatch's metrics between its backward passes and its optimizer step.

    Args:
        spike_limit: a gradient norm or value loss may be this many times its running mean; None: no limit.

    Attributes:
        means: running means by metric, saved in checkpoints.
    """

    def __init__(self, spike_limit: float | None) -> None:
        self._spike_limit = spike_limit
        self.means: dict[str, float] = {}

    def check(self, metrics: dict[str, float], where: str) -> None:
        """Check the metrics of one minibatch.

        Raises:
            Diverged: a metric is not finite, or above the limit; names it.
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise Diverged(f"{where}: {name} is {value}; {REMEDY}")
        for name in WATCHED if self._spike_limit else ():
            if name in metrics:
                self._compare(name, metrics[name], where)

    def _compare(self, name: str, value: float, where: str) -> None:
        assert self._spike_limit is not None
        mean = self.means.get(name, value)
        if value > self._spike_limit * mean > 0:
            limit = f"above learner.spike_limit={self._spike_limit:g} times its running mean {mean:.3g}"
            raise Diverged(f"{where}: {name} is {value:.3g}, {limit}; {REMEDY}")
        self.means[name] = MEMORY * mean + (1 - MEMORY) * value
