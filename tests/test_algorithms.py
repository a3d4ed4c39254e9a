"""PPO, RLOO, REINFORCE++ and GRPO, compared with small loops written from the papers' formulas."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from statistics import fmean, pstdev, stdev

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.schema import PPOConfig
from metaalign_rl.core.dataflow import Batch, Reward, Rollout, Sample
from metaalign_rl.core.errors import UserError
from metaalign_rl.data.world import build
from metaalign_rl.learner.batch import batch_of, make_batch
from metaalign_rl.learner.divergence import Diverged, DivergenceMonitor
from metaalign_rl.learner.losses import Penalty, PolicyObjective, Scale, ValueObjective
from metaalign_rl.ppo.advantages import add_advantages, needs_critic

ROWS = build.prompts(0, 4)
NONE = Penalty(0.0, "k3")


class Answer:
    """One answer to a prompt: its score and, by token, log-probability, the reference's and the value."""

    def __init__(self, prompt: int, score: float, tokens: list[tuple[float, float, float]]) -> None:
        self.prompt, self.score = prompt, score
        self.logprobs, self.ref_logprobs, self.values = (list(column) for column in zip(*tokens, strict=True))

    def kl(self, estimator: str = "k1") -> list[float]:
        ratios = [p - q for p, q in zip(self.logprobs, self.ref_logprobs, strict=True)]
        of = {"k1": lambda r: r, "k2": lambda r: r * r / 2, "k3": lambda r: math.exp(-r) - 1 + r}[estimator]
        return [of(ratio) for ratio in ratios]

    def rollout(self) -> Rollout:
        ids = list(range(2, 2 + len(self.logprobs)))
        sample = Sample(0, [1] * (self.prompt + 1), ids, self.logprobs, "x", finished=True, weight_version=0)
        return Rollout(ROWS[self.prompt], sample, Reward(self.score, None, None))


floats = st.floats(-3, 0, width=32)
tokens = st.lists(st.tuples(floats, floats, st.floats(-1, 1, width=32)), min_size=1, max_size=5)
answers = st.lists(
    st.lists(st.tuples(st.floats(0, 1, width=32), tokens), min_size=2, max_size=3), min_size=1, max_size=3
)
steps = answers.map(lambda prompts: [Answer(i, *drawn) for i, prompt in enumerate(prompts) for drawn in prompt])


def spread(rows: list[list[float]], mask: Tensor) -> Tensor:
    flat = torch.tensor([value for row in rows for value in row], dtype=torch.float32)
    return torch.zeros(mask.shape).masked_scatter(mask, flat)


def advantaged(answers: list[Answer], config: PPOConfig, kl_coef: float) -> Batch:
    rollouts = [answer.rollout() for answer in answers]
    batch = batch_of([rollout.sample for rollout in rollouts], pad_id=0)
    for name in ("logprobs", "ref_logprobs", "values"):
        setattr(batch, name, spread([getattr(answer, name) for answer in answers], batch.action_mask))
    add_advantages(batch, rollouts, config, kl_coef)
    return batch


def advantages_of(answers: list[Answer], config: PPOConfig, kl_coef: float = 0.1) -> list[list[float]]:
    batch = advantaged(answers, config, kl_coef)
    assert not batch.advantages[~batch.action_mask].any()
    return [row[mask].tolist() for row, mask in zip(batch.advantages, batch.action_mask, strict=True)]


def assert_close(found: list[list[float]], expected: list[list[float]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=2e-3)


def others(answers: list[Answer], answer: Answer, itself: bool = False) -> list[Answer]:
    return [one for one in answers if one.prompt == answer.prompt and (itself or one is not answer)]


def whitened(rows: list[list[float]]) -> list[list[float]]:
    flat = [value for row in rows for value in row]
    mean, deviation = fmean(flat), pstdev(flat)
    assume(deviation > 0.01)
    return [[(value - mean) / deviation for value in row] for row in rows]


def token_rewards(answer: Answer, kl_coef: float) -> list[float]:
    rewards = [-kl_coef * kl for kl in answer.kl()]
    rewards[-1] += answer.score
    return rewards


# Advantages


@given(step=steps)
@settings(deadline=None, max_examples=30)
def test_rloo_subtracts_the_mean_of_the_prompt_s_other_responses(step):
    """R(y_i) - 1/(k-1) Σ_{j≠i} R(y_j), with R = r - β log π/π_ref of the complete answer (arXiv:2402.14740)."""

    def worth(answer: Answer) -> float:
        return answer.score - 0.1 * sum(answer.kl())

    expected = [[worth(a) - fmean(map(worth, others(step, a)))] * len(a.logprobs) for a in step]
    assert_close(advantages_of(step, PPOConfig(algorithm="rloo")), expected)


@given(step=steps)
@settings(deadline=None, max_examples=30)
def test_grpo_normalizes_rewards_within_the_group(step):
    """(r_i - mean(r)) / std(r) over the prompt's answers, the KL being in the loss (arXiv:2402.03300)."""
    expected = []
    for answer in step:
        scores = [one.score for one in others(step, answer, itself=True)]
        assume(stdev(scores) > 0.1)
        expected.append([(answer.score - fmean(scores)) / stdev(scores)] * len(answer.logprobs))
    assert_close(advantages_of(step, PPOConfig(algorithm="grpo")), expected)


def test_grpo_gives_equal_rewards_an_advantage_of_zero():
    step = [Answer(0, 0.7, [(-1.0, -1.0, 0.0)]) for _ in range(3)]
    assert_close(advantages_of(step, PPOConfig(algorithm="grpo")), [[0.0]] * 3)


@given(step=steps, gamma=st.floats(0.5, 1))
@settings(deadline=None, max_examples=30)
def test_reinforce_plus_plus_whitens_rewards_to_go_over_the_batch(step, gamma):
    """A_t = Σ_{s≥t} γ^(s-t) (r 1[s=T] - β KL_s), less the batch's mean, over its deviation (arXiv:2501.03262)."""
    to_go = []
    for answer in step:
        rewards = token_rewards(answer, 0.1)
        length = len(rewards)
        to_go.append([sum(gamma ** (s - t) * rewards[s] for s in range(t, length)) for t in range(length)])
    assert_close(advantages_of(step, PPOConfig(algorithm="reinforce++", gamma=gamma)), whitened(to_go))


@given(step=steps, lam=st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_ppo_whitens_generalized_advantages_and_keeps_the_returns(step, lam):
    """A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ V_{t+1} - V_t (arXiv:1707.06347)."""
    estimates = []
    for answer in step:
        rewards, after = token_rewards(answer, 0.1), [*answer.values[1:], 0.0]
        deltas = [r + v1 - v0 for r, v0, v1 in zip(rewards, answer.values, after, strict=True)]
        estimates.append([sum(lam ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))])
    config = PPOConfig(algorithm="ppo", lam=lam)
    assert_close(advantages_of(step, config), whitened(estimates))
    returns = [[a + v for a, v in zip(row, one.values, strict=True)] for row, one in zip(estimates, step, strict=True)]
    batch = advantaged(step, config, 0.1)
    torch.testing.assert_close(batch.returns, spread(returns, batch.action_mask), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce++"])
def test_responses_left_out_of_the_loss_do_not_count_in_the_whitening(algorithm):
    step = [Answer(i, score, [(-1.0, -1.2, 0.1), (-0.5, -0.4, 0.3)]) for i, score in enumerate((0.1, 0.9, 0.4))]
    rollouts = [answer.rollout() for answer in step]
    batch = advantaged(step, PPOConfig(algorithm=algorithm), 0.1)
    add_advantages(batch, rollouts, PPOConfig(algorithm=algorithm), 0.1, learned=[0, 2])
    expected = advantages_of([step[0], step[2]], PPOConfig(algorithm=algorithm))
    kept = batch.select([0, 2])
    assert_close([row[mask].tolist() for row, mask in zip(kept.advantages, kept.action_mask, strict=True)], expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_every_kl_estimator_works_in_the_reward(estimator):
    step = [Answer(0, 1.0, [(-1.0, -1.5, 0), (-2.0, -1.0, 0)]), Answer(0, 0.0, [(-0.5, -0.7, 0)])]
    first, second = (answer.score - 0.1 * sum(answer.kl(estimator)) for answer in step)
    config = PPOConfig(algorithm="rloo", kl_estimator=estimator)
    assert_close(advantages_of(step, config), [[first - second] * 2, [second - first]])


def test_a_kl_in_the_loss_is_not_in_the_reward():
    step = [Answer(0, 1.0, [(-1.0, -3.0, 0)]), Answer(0, 0.0, [(-0.5, -0.7, 0)])]
    assert_close(advantages_of(step, PPOConfig(algorithm="rloo", kl_in="loss")), [[1.0], [-1.0]])


def test_rows_with_equal_prompts_are_different_groups():
    step = [Answer(prompt, score, [(-1.0, -1.0, 0)]) for prompt, score in ((0, 1.0), (0, 0.0), (1, 5.0), (1, 5.0))]
    rollouts = [answer.rollout() for answer in step]
    rollouts = [replace(rollout, sample=replace(rollout.sample, prompt_ids=[1])) for rollout in rollouts]
    batch = batch_of([rollout.sample for rollout in rollouts], pad_id=0)
    batch.logprobs = batch.ref_logprobs = torch.zeros(batch.action_mask.shape)
    add_advantages(batch, rollouts, PPOConfig(algorithm="rloo"), kl_coef=0.0)
    assert batch.advantages.flatten().tolist() == [1.0, -1.0, 0.0, 0.0]


# Settings


def test_the_kl_is_placed_as_in_the_algorithm_s_paper_by_default():
    for algorithm in ("ppo", "rloo", "reinforce++", "grpo"):
        config = PPOConfig(algorithm=algorithm)
        assert (config.kl_in_loss, config.kl_by) == ((True, "k3") if algorithm == "grpo" else (False, "k1"))
        assert PPOConfig(algorithm=algorithm, kl_in="loss").kl_in_loss
        assert not PPOConfig(algorithm=algorithm, kl_in="reward").kl_in_loss
        assert needs_critic(algorithm) == (algorithm == "ppo")
    assert PPOConfig(algorithm="grpo", kl_estimator="k2").kl_by == "k2"


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_group_based_algorithms_need_two_responses_per_prompt(algorithm):
    with pytest.raises(UserError, match=rf"ppo.samples_per_prompt: expected 2 or more with .*{algorithm}.*, found 1"):
        PPOConfig(algorithm=algorithm, samples_per_prompt=1)
    with pytest.raises(UserError, match="ppo.gamma: expected 1 with"):
        PPOConfig(algorithm=algorithm, gamma=0.9)
    PPOConfig(algorithm="reinforce++", samples_per_prompt=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correction_bounds": (5.0, 0.5)}, "correction_bounds: expected two numbers from 0 up, the second one larger"),
        ({"correction": "sequence", "correction_mode": "clip"}, "correction_mode: expected mask"),
        ({"correction_gate": "tv", "correction_mode": "clip", "correction_bounds": (0, 1)}, "correction_mode"),
        ({"correction_gate": "tv"}, "correction_bounds: expected 0 as the lower bound with learner.correction_gate=tv"),
        ({"correction_gate": "kl"}, "correction_gate: expected one of ratio, binary_kl, tv, found 'kl'"),
    ],
)
def test_a_meaningless_correction_is_an_error(changes, message):
    with pytest.raises(UserError, match=rf"learner\.{message}"):
        LearnerConfig(**{"correction": "token"} | changes)


# Losses


def numbers(rows: list[int], low: float, high: float, seed: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(length, generator=generator) * (high - low) + low).tolist() for length in rows]


LENGTHS = [3, 1, 4]
NOW, OLD, ROLLOUT, REFERENCE = (numbers(LENGTHS, -2.0, -0.5, seed) for seed in range(4))
ADVANTAGES = numbers(LENGTHS, -1.0, 1.0, seed=4)
ALL = Scale(tokens=sum(LENGTHS), samples=len(LENGTHS), ranks=1)


def loss_batch() -> Batch:
    batch = make_batch([([1] * (5 - length), [2] * length) for length in LENGTHS], 0, ROLLOUT)
    old, ref, advantages = (spread(rows, batch.action_mask) for rows in (OLD, REFERENCE, ADVANTAGES))
    return replace(batch, logprobs=old, ref_logprobs=ref, advantages=advantages)


def policy_loss(config: LearnerConfig, penalty: Penalty = NONE) -> tuple[float, Tensor, dict[str, float]]:
    """The loss, its gradient by log-probability and the metrics, from the learner's own objective."""
    batch = loss_batch()
    now = spread(NOW, batch.action_mask).requires_grad_()
    loss, metrics = PolicyObjective(config)(now, torch.zeros(ALL.tokens), batch, ALL, penalty)
    loss.backward()
    return loss.item(), now.grad[batch.action_mask], {name: value.item() for name, value in metrics.items()}


def mean_loss(token: Callable[[int, int], float], by_sample: bool = False) -> float:
    rows = [[token(row, t) for t in range(length)] for row, length in enumerate(LENGTHS)]
    return fmean(map(fmean, rows)) if by_sample else sum(map(sum, rows)) / sum(LENGTHS)


def clipped(row: int, t: int, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> float:
    """-min(ρA, clip(ρ)A), and -max(that, cA) for a negative A (arXiv:1707.06347, arXiv:1912.09729)."""
    ratio, advantage = math.exp(NOW[row][t] - OLD[row][t]), ADVANTAGES[row][t]
    gain = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    return -max(gain, dual * advantage) if dual and advantage < 0 else -gain


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize(("high", "dual"), [(0.2, None), (0.4, None), (0.2, 1.5)])
def test_the_policy_loss_follows_clip_high_and_dual_clip(high, dual, by_sample):
    config = LearnerConfig(clip_high=high, dual_clip=dual, loss_aggregation="samples" if by_sample else "tokens")
    expected = mean_loss(lambda row, t: clipped(row, t, high=high, dual=dual), by_sample)
    assert policy_loss(config)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_the_value_loss_takes_the_worse_of_the_value_and_the_clipped_value(value_clip):
    def squared(row: int, t: int) -> float:
        value, old, target = NOW[row][t], OLD[row][t], REFERENCE[row][t]
        near = value if value_clip is None else old + min(max(value - old, -value_clip), value_clip)
        return max((value - target) ** 2, (near - target) ** 2) / 2

    batch = loss_batch()
    values, old, returns = (spread(rows, batch.action_mask) for rows in (NOW, OLD, REFERENCE))
    batch = replace(batch, values=old, returns=returns)
    loss, _ = ValueObjective(LearnerConfig(value_clip=value_clip))(values, batch, ALL)
    assert loss.item() == pytest.approx(mean_loss(squared), rel=1e-5)


GATES: dict[str, Callable[[float, float], float]] = {  # from the engine's and the learner's probability of a token
    "ratio": lambda p, q: q / p,
    "binary_kl": lambda p, q: p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
    "tv": lambda p, q: abs(p - q),
}
CORRECTIONS = [("token", "clip", "ratio"), *product(["token", "sequence"], ["mask"], GATES)]


@pytest.mark.parametrize(("level", "mode", "gate"), CORRECTIONS)
def test_off_policy_correction_weights_or_masks_tokens_by_their_ratio(level, mode, gate):
    low, high = {"ratio": (0.8, 1.25), "binary_kl": (0.0, 0.05), "tv": (0.0, 0.12)}[gate]
    probabilities = [
        list(zip(map(math.exp, p), map(math.exp, q), strict=True)) for p, q in zip(ROLLOUT, OLD, strict=True)
    ]

    def statistic(row: int, t: int) -> float:
        if level == "token":
            return GATES[gate](*probabilities[row][t])
        if gate == "ratio":
            return math.exp(fmean(math.log(q / p) for p, q in probabilities[row]))
        return fmean(GATES[gate](p, q) for p, q in probabilities[row])

    def corrected(row: int, t: int) -> float:
        p, q = probabilities[row][t]
        value = statistic(row, t)
        weight = min(max(value, low), high) if mode == "clip" else (q / p) * (low <= value <= high)
        return weight * clipped(row, t)

    config = LearnerConfig(correction=level, correction_mode=mode, correction_gate=gate, correction_bounds=(low, high))
    loss, _, metrics = policy_loss(config)
    assert loss == pytest.approx(mean_loss(corrected), rel=1e-4, abs=1e-6)
    outside = mean_loss(lambda row, t: not low <= statistic(row, t) <= high, by_sample=level == "sequence")
    assert metrics["corrected"] == pytest.approx(outside)
    assert 0 < outside < 1
    drift = mean_loss(lambda row, t: ROLLOUT[row][t] - OLD[row][t])
    assert metrics["rollout_kl"] == pytest.approx(drift, rel=1e-4)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("by_sample", [False, True])
def test_the_kl_in_the_loss_has_the_gradient_of_its_formula(estimator, by_sample):
    config = LearnerConfig(loss_aggregation="samples" if by_sample else "tokens")
    plain, plain_gradient, _ = policy_loss(config)
    loss, gradient, metrics = policy_loss(config, Penalty(0.3, estimator))
    now, reference = (torch.tensor([value for row in rows for value in row]) for rows in (NOW, REFERENCE))
    now.requires_grad_()
    kl = (now - reference) ** 2 / 2 if estimator == "k2" else torch.exp(reference - now) - (reference - now) - 1
    weights = torch.tensor([1 / (length * len(LENGTHS)) if by_sample else 1 / ALL.tokens for length in LENGTHS])
    mean = (kl * weights.repeat_interleave(torch.tensor(LENGTHS))).sum()
    mean.backward()
    torch.testing.assert_close(gradient - plain_gradient, 0.3 * now.grad, rtol=1e-3, atol=1e-6)
    assert loss - plain == pytest.approx(0.3 * mean.item(), rel=1e-4)
    assert metrics["kl_loss"] == pytest.approx(mean.item(), rel=1e-4)


def test_k1_in_the_loss_has_the_gradient_of_the_kl_itself():
    """In the mean over what the old policy draws; the plain gradient of log π would come to 0."""
    theta, old, reference = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    theta.requires_grad_()
    divergence = (theta.softmax(0) * (theta.log_softmax(0) - reference.log_softmax(0))).sum()
    expected = torch.autograd.grad(divergence, theta)[0]
    found = torch.zeros(6)
    objective, scale = PolicyObjective(LearnerConfig()), Scale(tokens=1, samples=1, ranks=1)
    for token, probability in enumerate(old.softmax(0)):
        batch = make_batch([([1], [token])], pad_id=0)
        batch.logprobs, batch.ref_logprobs = (logits.log_softmax(0)[token].view(1, 1) for logits in (old, reference))
        batch.advantages = torch.zeros(1, 1)
        now = theta.log_softmax(0)[token].view(1, 1)
        loss, _ = objective(now, torch.zeros(1), batch, scale, Penalty(1.0, "k1"))
        found += probability * torch.autograd.grad(loss, theta)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


# Divergence


def test_spikes_are_measured_against_the_running_mean_of_accepted_steps():
    watch = DivergenceMonitor(spike_limit=10.0)
    for norm in (1.0, 2.0, 9.0):
        watch.check({"grad_norm": norm, "policy_loss": -1e9 * norm}, "here")
    with pytest.raises(
        Diverged, match="here: grad_norm is 15, above learner.spike_limit=10 times its running mean 1.4"
    ):
        watch.check({"grad_norm": 15.0}, "here")
    watch.check({"grad_norm": 14.0}, "here")
    DivergenceMonitor(None).check({"grad_norm": 1e30}, "off by default")
