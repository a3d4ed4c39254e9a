"""From rewards to what the learner fits: the algorithms' advantages."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metaalign_rl.config.schema import PPOConfig
from metaalign_rl.core.dataflow import Batch, Rollout
from metaalign_rl.learner.openrlhf_modules import openrlhf_module

TIER_DEVIATION_FLOOR = 0.1  # a solved tier's rewards hardly vary; dividing by less would amplify noise


def needs_critic(algorithm: str) -> bool:
    """Whether the algorithm learns values."""
    return algorithm == "ppo"


def add_advantages(batch: Batch, rollouts: Sequence[Rollout], config: PPOConfig, kl_coef: float) -> None:
    """Fill in an evaluated batch's `advantages`, and with a critic its `returns`, as `config.algorithm` has them.

    - ppo: generalised advantage estimates, whitened over the batch (arXiv:1707.06347).
    - reinforce++: rewards to go, whitened over the batch (arXiv:2501.03262).
    - rloo: the answer's reward against the mean of the prompt's other answers (arXiv:2402.14740).
    - grpo: the answer's reward in deviations from the mean of the prompt's answers (arXiv:2402.03300).

    A token's reward is -kl_coef times its KL, unless that is in the loss, and at the last token the score. Under rloo
    and grpo an answer is one action: its reward is the sum, and its advantage that of each token.
    """
    assert batch.logprobs is not None and batch.ref_logprobs is not None
    mask = batch.action_mask
    in_reward = 0.0 if config.kl_in_loss else kl_coef
    scores = scores_of(rollouts, config.normalize_per_tier)
    rewards = token_rewards(scores, batch.logprobs, batch.ref_logprobs, mask, in_reward, config.kl_by)
    if config.algorithm == "ppo":
        assert batch.values is not None
        advantages, batch.returns = gae(rewards, batch.values, mask, config.gamma, config.lam)
        batch.advantages = whiten(advantages, mask)
    elif config.algorithm == "reinforce++":
        batch.advantages = whiten(returns_to_go(rewards, mask, config.gamma), mask)
    else:
        compare = leave_one_out if config.algorithm == "rloo" else group_normalised
        batch.advantages = compare(rewards.sum(dim=1), _groups(rollouts))[:, None] * mask


def scores_of(rollouts: Sequence[Rollout], normalize_per_tier: bool) -> Tensor:
    """The rewards [B], in each governing tier with mean 0 and deviation 1 if wanted."""
    scores = torch.tensor([rollout.reward.value for rollout in rollouts], dtype=torch.float32)
    if normalize_per_tier:
        tiers = [rollout.row.tier for rollout in rollouts]
        for tier in set(tiers):
            members = torch.tensor([other == tier for other in tiers])
            part = scores[members]
            scores[members] = (part - part.mean()) / part.std(correction=0).clamp(min=TIER_DEVIATION_FLOOR)
    return scores


def _groups(rollouts: Sequence[Rollout]) -> Tensor:
    """By answer the number of its row; a row's answers are of one group, since rows that read alike may differ in
    what they reward."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(rollout.row.id, len(numbers)) for rollout in rollouts])


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
