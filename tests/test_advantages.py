"""Advantages, KL and its coefficient, and the learner's settings. No model runs."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.schema import Config, PPOConfig
from metaalign_rl.core.errors import UserError
from metaalign_rl.ppo.advantages import gae, token_kl, token_rewards, whiten
from metaalign_rl.ppo.kl_controller import KLController


@given(
    response=st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=8),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
@settings(deadline=None, max_examples=50)
def test_gae_is_the_weighted_sum_of_temporal_differences(response, before, after, gamma, lam):
    rewards, values = ([pair[side] for pair in response] for side in (0, 1))
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]

    def row(numbers: list[float], outside: float) -> Tensor:
        return torch.tensor([[outside] * before + numbers + [outside] * after], dtype=torch.float64)

    mask = row([1.0] * len(response), 0.0).bool()
    advantages, returns = gae(row(rewards, 9.0), row(values, 9.0), mask, gamma, lam)
    torch.testing.assert_close(advantages, row(expected, 0.0))
    torch.testing.assert_close(returns, row([a + v for a, v in zip(expected, values, strict=True)], 0.0))


def test_the_score_is_on_the_last_response_token_and_the_kl_on_each():
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    logprobs, ref_logprobs = torch.full((2, 4), -1.0), torch.full((2, 4), -1.5)
    rewards = token_rewards(torch.tensor([1.0, 2.0]), logprobs, ref_logprobs, mask, kl_coef=0.1)
    expected = [[0, -0.05, 0.95, 0], [-0.05, -0.05, -0.05, 1.95]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.5 + 0.60653066 - 1)])
def test_kl_estimators_follow_schulman(estimator, expected):
    kl = token_kl(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]]), estimator)
    assert kl.item() == pytest.approx(expected)


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_mask():
    mask = torch.tensor([[True, True, False], [True, False, True]])
    white = whiten(torch.tensor([[1.0, 2.0, 100.0], [3.0, 100.0, 6.0]]), mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].var(correction=0).item() == pytest.approx(1)
    assert not white[~mask].any()


def test_the_adaptive_kl_coefficient_follows_ziegler():
    kl = KLController(0.2, target=6.0, horizon=1000)
    kl.update(kl=6.6, samples=100)  # 10 % over the target
    assert kl.value == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    kl.update(kl=60.0, samples=100)  # the error is clipped to 20 %
    assert kl.value == pytest.approx(0.2 * 1.01 * (1 + 0.2 * 0.1))
    assert json.loads(json.dumps(kl.value)) == kl.value


def test_a_fixed_kl_coefficient_does_not_change():
    kl = KLController(0.05)
    kl.update(kl=100.0, samples=100)
    assert kl.value == 0.05


# Settings


def test_an_invalid_setting_is_named():
    with pytest.raises(UserError, match=r"learner\.zero_stage: expected one of 0, 1, 2, 3, found 4"):
        LearnerConfig(zero_stage=4)


def test_bfloat16_needs_zero():
    with pytest.raises(UserError, match=r"learner\.zero_stage: expected 1, 2 or 3 with model.dtype=bfloat16, found 0"):
        LearnerConfig(zero_stage=0).check_dtype("bfloat16")
    LearnerConfig(zero_stage=2).check_dtype("bfloat16")


def test_learning_rates_warm_up_and_then_fall_to_zero():
    config = LearnerConfig(schedule="linear", warmup_steps=2, total_steps=6)
    assert [config.rate_factor(step) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_cosine_schedule_falls_slowly_at_both_ends():
    config = LearnerConfig(schedule="cosine", warmup_steps=2, total_steps=6)
    expected = [0.5, 1.0, *((1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)), 0.0]
    assert [config.rate_factor(step) for step in range(8)] == pytest.approx(expected)


def test_the_schedule_ends_with_the_run():
    ppo = PPOConfig(steps=10, prompts_per_step=25, samples_per_prompt=4)
    learner = LearnerConfig(minibatch_size=64, epochs=3)
    assert Config(ppo=ppo, learner=learner).policy_optimizer_steps == 10 * 3 * 2


def test_a_warm_up_that_outlasts_the_policy_s_updates_is_refused_when_the_config_is_read():
    ppo = PPOConfig(steps=10, prompts_per_step=16, samples_per_prompt=4, critic_warmup_steps=8)
    with pytest.raises(UserError, match="learner.warmup_steps: expected less than 2, the policy's optimizer steps"):
        Config(ppo=ppo, learner=LearnerConfig(minibatch_size=64, epochs=1, warmup_steps=2))
