"""From rewards to advantages, for each algorithm. Tensors are [B, T-1] unless noted; masks are True at responses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metaalign_rl.config.schema import PPOConfig
from metaalign_rl.core.dataflow import Batch, Rollout
from metaalign_rl.learner.openrlhf_modules import openrlhf_module

TIER_DEVIATION_FLOOR = 0.1  # rewards of a solved tier hardly vary; dividing by less would amplify noise


def needs_critic(algorithm: str) -> bool:
    """Whether the algorithm trains a critic."""
    return algorithm == "ppo"


def add_advantages(
    batch: Batch, rollouts: Sequence[Rollout], config: PPOConfig, kl_coef: float, learned: Sequence[int] | None = None
) -> None:
    """Set an evaluated batch's `advantages`, and with a critic its `returns`, according to `config.algorithm`.

    - ppo: generalized advantage estimates, whitened over the batch (arXiv:1707.06347).
    - reinforce++: rewards to go, whitened over the batch (arXiv:2501.03262).
    - rloo: the response's reward minus the mean of the prompt's other responses (arXiv:2402.14740).
    - grpo: the response's reward, normalized over the prompt's responses (arXiv:2402.03300).

    Each token's reward is -kl_coef times its KL, unless the KL is in the loss. The last token also gets the score. For
    rloo and grpo, a response is one action: its reward is the sum over its tokens, and all tokens share one advantage.

    Args:
        learned: indices of the rollouts that enter the loss; None: all. Whitening is over their tokens.
    """
    assert batch.logprobs is not None and batch.ref_logprobs is not None
    mask = batch.action_mask
    counted = mask if learned is None else mask & _chosen(learned, len(rollouts))[:, None]
    in_reward = 0.0 if config.kl_in_loss else kl_coef
    scores = scores_of(rollouts, config.normalize_per_tier)
    rewards = token_rewards(scores, batch.logprobs, batch.ref_logprobs, mask, in_reward, config.kl_by)
    if config.algorithm == "ppo":
        assert batch.values is not None
        advantages, batch.returns = gae(rewards, batch.values, mask, config.gamma, config.lam)
        batch.advantages = whiten(advantages, counted)
    elif config.algorithm == "reinforce++":
        batch.advantages = whiten(returns_to_go(rewards, mask, config.gamma), counted)
    else:
        compare = leave_one_out if config.algorithm == "rloo" else group_normalized
        batch.advantages = compare(rewards.sum(dim=1), _groups(rollouts))[:, None] * mask


def _chosen(indices: Sequence[int], count: int) -> Tensor:
    """[count], True at the indices."""
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[list(indices)] = True
    return chosen


def scores_of(rollouts: Sequence[Rollout], normalize_per_tier: bool) -> Tensor:
    """The rewards, [B]. With `normalize_per_tier`, mean 0 and deviation 1 within each governing tier."""
    scores = torch.tensor([rollout.reward.value for rollout in rollouts], dtype=torch.float32)
    if normalize_per_tier:
        tiers = [rollout.row.tier for rollout in rollouts]
        for tier in set(tiers):
            members = torch.tensor([other == tier for other in tiers])
            part = scores[members]
            scores[members] = (part - part.mean()) / part.std(correction=0).clamp(min=TIER_DEVIATION_FLOOR)
    return scores


def _groups(rollouts: Sequence[Rollout]) -> Tensor:
    """The group of each rollout, [B]: its row. Rows with equal prompts are different groups, since their rewards may
    differ."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(rollout.row.id, len(numbers)) for rollout in rollouts])


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str = "k1") -> Tensor:
    """Estimated KL(policy || reference) at each response token, 0 elsewhere, in nats.

    Args:
        estimator: "k1", "k2" or "k3" (Schulman 2020, "Approximating KL divergence"). OpenRLHF clamps each to ±10.
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
    """Reward per token: -kl_coef times its KL, plus the sample's score at its last response token.

    Args:
        scores: [B], one per sample. Every sample has a response token.
    """
    assert bool(mask.any(dim=1).all()), "a sample has no response token to put its score on"
    rewards = -kl_coef * token_kl(logprobs, ref_logprobs, mask, estimator)
    last = mask.shape[1] - 1 - mask.long().flip(1).argmax(dim=1)
    rewards[torch.arange(len(scores)), last] += scores.to(rewards.dtype)
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates and returns (Schulman et al. 2016, equation 16), 0 outside the mask.

    With d_t = r_t + gamma * V_{t+1} - V_t: A_t = d_t + gamma * lam * A_{t+1}, returns = A + V. Here t+1 is the sample's
    next response token; other tokens are skipped. After the last response token, V and A are 0.
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
    """Discounted sum of the rewards from each response token to the end, 0 outside the mask."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)[0]


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """Each response's reward minus the mean of its group's other responses (RLOO, arXiv:2402.14740, section 2.2).

    Args:
        rewards: [B], one per response.
        groups: [B], index of each response's prompt, from 0. Every prompt has two responses or more.
    """
    count, mean, _ = _moments(rewards, groups)
    return (rewards - mean) * count / (count - 1)


def group_normalized(rewards: Tensor, groups: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Each response's reward minus its group's mean, in standard deviations (GRPO, arXiv:2402.03300, section 4.1.2).

    Args:
        rewards, groups: see `leave_one_out`.
        epsilon: added to the deviation; without it, rounding would separate responses with equal rewards.
    """
    _, mean, deviation = _moments(rewards, groups)
    return (rewards - mean) / (deviation + epsilon)


def _moments(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Size, mean reward and sample deviation (n - 1) of each response's group, all [B]."""
    count = groups.bincount()
    assert int(count.min()) >= 2, "every prompt needs two responses or more"
    mean = torch.zeros(len(count)).index_add(0, groups, rewards) / count
    squares = torch.zeros(len(count)).index_add(0, groups, (rewards - mean[groups]) ** 2)
    return count[groups], mean[groups], (squares / (count - 1)).sqrt()[groups]


def whiten(advantages: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over the batch's response tokens; 0 elsewhere."""
    chosen = advantages[mask]
    scaled = (advantages - chosen.mean()) * torch.rsqrt(chosen.var(correction=0) + epsilon)
    return torch.where(mask, scaled, 0.0)
