"""From rewards to what the learner fits: the algorithms' advantages."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metaalign_rl.config.schema import PPOConfig
from metaalign_rl.ppo.estimators import (
    gae,
    group_normalised,
    leave_one_out,
    returns_to_go,
    token_rewards,
    whiten,
)
from metaalign_rl.learner.batch import Batch
from metaalign_rl.ppo.collector import Rollout

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
