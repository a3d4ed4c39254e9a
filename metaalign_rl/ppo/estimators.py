"""From scores to advantages. Tensors are [B, T-1] unless said otherwise; masks are True at responses."""

import torch
from torch import Tensor

from metaalign_rl.learner.openrlhf_modules import openrlhf_module


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str = "k1") -> Tensor:
    """Estimated KL(policy || reference) at each response token, 0 elsewhere, in nats.

    Args:
        estimator: "k1", "k2" or "k3" (Schulman 2020, "Approximating KL divergence"); OpenRLHF clamps each to
            ±10.
    """
    kl = openrlhf_module("models.utils").compute_approx_kl(logprobs, ref_logprobs, kl_estimator=estimator)
    return torch.where(mask, kl, 0.0)


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: str = "k1",
) -> Tensor:
    """Reward of each token: -kl_coef times its KL, and the sample's score at its last response token.

    Args:
        scores: [B], one a sample; every sample has a response token.
    """
    assert bool(mask.any(dim=1).all()), "a sample without response tokens has no place for its score"
    rewards = -kl_coef * token_kl(logprobs, ref_logprobs, mask, estimator)
    last = mask.shape[1] - 1 - mask.long().flip(1).argmax(dim=1)
    rewards[torch.arange(len(scores)), last] += scores.to(rewards.dtype)
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (Schulman et al. 2016, equation 16), 0 outside the mask.

    With d_t = r_t + gamma * V_{t+1} - V_t: A_t = d_t + gamma * lam * A_{t+1}, returns = A + V. A step leads
    to the sample's next response token, so what stands between two of them is passed over; after the last, V
    and A are 0.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(here, advantage, 0.0)
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
    return advantages, torch.where(mask, advantages + values, 0.0)


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each response token on, 0 outside the mask."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)[0]


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """Each answer's reward minus the mean of the others of its group (RLOO, arXiv:2402.14740, section 2.2).

    Args:
        rewards: [B], one an answer.
        groups: [B], which prompt an answer is to, from 0; two answers or more to each.
    """
    count, mean, _ = _moments(rewards, groups)
    return (rewards - mean) * count / (count - 1)


def group_normalised(rewards: Tensor, groups: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Each answer's reward in deviations from its group's mean (GRPO, arXiv:2402.03300, section 4.1.2).

    Args:
        rewards, groups: as for `leave_one_out`.
        epsilon: added to the deviation, or rounding would set answers of one reward apart.
    """
    _, mean, deviation = _moments(rewards, groups)
    return (rewards - mean) / (deviation + epsilon)


def _moments(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many answers the group of each has, their mean reward and its deviation (of a sample, n - 1), all [B]."""
    count = groups.bincount()
    assert int(count.min()) >= 2, "a group of one answer has nothing to be compared with"
    mean = torch.zeros(len(count)).index_add(0, groups, rewards) / count
    squares = torch.zeros(len(count)).index_add(0, groups, (rewards - mean[groups]) ** 2)
    return count[groups], mean[groups], (squares / (count - 1)).sqrt()[groups]


def whiten(advantages: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over the whole batch's response tokens; 0 elsewhere."""
    chosen = advantages[mask]
    scaled = (advantages - chosen.mean()) * torch.rsqrt(chosen.var(correction=0) + epsilon)
    return torch.where(mask, scaled, 0.0)
