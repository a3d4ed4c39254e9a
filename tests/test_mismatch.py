"""The guard against engines with other weights than the learners': it must tell them from rounding."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.schema import Config, ModelConfig, PPOConfig
from metaalign_rl.core.dataflow import Batch, Reward, Rollout, Row, Sample
from metaalign_rl.learner.batch import batch_of
from metaalign_rl.ppo.loop import PPOTrainer
from metaalign_rl.ppo.mismatch import MismatchGuard
from metaalign_rl.weights import StaleEngine

ROW = Row(
    id="r", family="test", relation="system_only", tier="system", system_info="", user_info="",
    messages=[{"role": "user", "content": "hello"}],
)  # fmt: skip
ROUNDING = 0.06  # deviation of a log-probability of an uncertain token; bfloat16 at 135M is like this


def guard_of(dtype: str = "bfloat16", baseline: float | None = None, **ppo: object) -> MismatchGuard:
    learner = LearnerConfig(correction="token") if ppo.get("staleness") else LearnerConfig()
    return MismatchGuard(Config(ppo=PPOConfig(**ppo), model=ModelConfig(dtype=dtype), learner=learner), baseline)


def drawn(
    seed: int,
    *,
    version: int,
    engines: int = 2,
    rounding: float = ROUNDING,
    stale: dict[int, float] | None = None,
    certain: float = 0.0,
    samples: int = 32,
) -> tuple[Batch, list[Rollout]]:
    """A step of `samples` responses of 40 tokens, split over the engines in order.

    Args:
        stale: by engine, the deviation of its log-probabilities in addition to rounding.
        certain: share of the tokens that the policy is certain of.
    """
    make = torch.Generator().manual_seed(seed)
    learner = torch.log(torch.rand(samples, 40, generator=make).clamp(min=0.01))
    learner[torch.rand(samples, 40, generator=make) < certain] = -1e-4
    rollouts, rows = [], []
    for index in range(samples):
        engine = index * engines // samples
        deviation = (rounding**2 + (stale or {}).get(engine, 0.0) ** 2) ** 0.5
        noise = torch.randn(40, generator=make) * deviation * -torch.expm1(learner[index])
        said = (learner[index] + noise).tolist()
        sample = Sample(index, [1], [2] * 40, said, "x", True, version, engine=engine, first_version=version)
        rollouts.append(Rollout(ROW, sample, Reward(0.0, None, None)))
        rows.append(sample)
    batch = batch_of(rows, pad_id=0)
    logprobs = torch.zeros(batch.action_mask.shape).masked_scatter_(batch.action_mask, learner)
    return replace(batch, logprobs=logprobs), rollouts


def test_honest_rounding_never_stops_a_run():
    guard = guard_of()
    found = [guard.check(*drawn(step, version=step), step) for step in range(200)]
    assert max(found) < 0.05 and guard.baseline is not None


@pytest.mark.parametrize("engines", [2, 16])
def test_one_stale_engine_of_many_is_named(engines):
    guard = guard_of()
    guard.check(*drawn(0, version=0, engines=engines, samples=128), 0)
    with pytest.raises(StaleEngine, match="rollout engine 1 .* version 1, .* stale or wrong"):
        guard.check(*drawn(1, version=1, engines=engines, samples=128, stale={1: 0.12}), 1)


def test_a_single_stale_engine_is_compared_with_the_first_step():
    guard = guard_of()
    guard.check(*drawn(0, version=0, engines=1), 0)
    guard.check(*drawn(1, version=1, engines=1), 1)
    with pytest.raises(StaleEngine, match="rollout engine 0"):
        guard.check(*drawn(2, version=2, engines=1, stale={0: 0.12}), 2)


def test_one_engine_that_is_wrong_from_the_start_is_found_among_others():
    with pytest.raises(StaleEngine, match="rollout engine 1"):
        guard_of().check(*drawn(0, version=0, stale={1: 0.12}), 0)


def test_engines_that_are_all_wrong_from_the_start_exceed_the_fixed_limit():
    with pytest.raises(StaleEngine, match=r"rollout engine 0 .* \(limit 0.2\)"):
        guard_of().check(*drawn(0, version=0, rounding=1.0), 0)


def test_a_policy_that_becomes_certain_does_not_hide_a_stale_engine():
    """Rounding then moves most log-probabilities less, so the mean falls."""
    guard = guard_of()
    guard.check(*drawn(0, version=0, engines=1), 0)
    assert guard.check(*drawn(1, version=1, engines=1, certain=0.6), 1) < 0.02
    with pytest.raises(StaleEngine, match="rollout engine 0"):
        guard.check(*drawn(2, version=2, engines=1, certain=0.6, stale={0: 0.12}), 2)


def test_a_policy_that_becomes_uncertain_is_not_taken_for_a_stale_engine():
    guard = guard_of()
    low = guard.check(*drawn(0, version=0, engines=1, certain=0.7), 0)
    assert guard.check(*drawn(1, version=1, engines=1), 1) > 1.5 * low


def test_a_resumed_run_keeps_its_baseline_or_measures_it_again():
    first = guard_of()
    first.check(*drawn(0, version=0, engines=1), 0)
    late = drawn(5, version=5, engines=1, stale={0: 0.12})
    with pytest.raises(StaleEngine):
        guard_of(baseline=first.baseline).check(*late, 5)
    guard_of().check(*late, 5)


def test_in_float32_less_than_a_thousandth_is_rounding():
    guard = guard_of("float32")
    guard.check(*drawn(0, version=0, rounding=1e-6), 0)
    assert guard.check(*drawn(1, version=1, rounding=1e-3), 1) < 1e-3
    with pytest.raises(StaleEngine, match=r"\(limit 0.001\)"):
        guard.check(*drawn(2, version=2, rounding=1e-6, stale={1: 0.01}), 2)


def test_a_few_samples_are_no_evidence():
    guard = guard_of()
    guard.check(*drawn(0, version=0), 0)
    for seed in range(50):
        guard.check(*drawn(seed, version=1, samples=4), 1)


def test_with_staleness_engines_are_compared_with_each_other():
    """The policy has moved since the samples were drawn, for all engines by the same amount."""
    guard = guard_of(staleness=1)
    guard.check(*drawn(0, version=0), 0)
    guard.check(*drawn(1, version=0, stale={0: 0.5, 1: 0.5}), 1)
    with pytest.raises(StaleEngine, match="rollout engine 1"):
        guard.check(*drawn(2, version=1, stale={0: 0.2, 1: 0.6}), 2)


def test_a_nan_is_a_mismatch():
    batch, rollouts = drawn(0, version=0)
    batch.rollout_logprobs[0, 0] = float("nan")
    with pytest.raises(StaleEngine, match="nan nats per token"):
        guard_of().check(batch, rollouts, 0)


def test_samples_from_another_weight_version_stop_the_run():
    (batch, rollouts), (_, old) = drawn(0, version=4), drawn(0, version=3)
    with pytest.raises(StaleEngine, match="rollout engine 1 sampled from weight version 3, expected version 4"):
        guard_of().check(batch, rollouts[:-1] + old[-1:], 4)


# Whose log-probabilities the trainer gives to the guard.


def trainer(batch: Batch, warmup: int = 0) -> PPOTrainer:
    """A trainer whose learners' update had the batch's last two samples in its first minibatch."""
    found = PPOTrainer.__new__(PPOTrainer)
    ppo, learner = PPOConfig(critic_warmup_steps=warmup), LearnerConfig(old_logprobs="engine")
    found.config = Config(ppo=ppo, learner=learner, model=ModelConfig(dtype="bfloat16"))
    found.recovery = SimpleNamespace(guard=MismatchGuard(found.config))
    rows = [len(batch) - 2, len(batch) - 1]
    found.learners = SimpleNamespace(call=lambda method: (rows, batch.logprobs))
    return found


def test_without_the_learner_s_log_probabilities_the_first_minibatch_is_checked_after_the_update():
    batch, rollouts = drawn(0, version=0)
    learned = list(range(0, 32, 3))  # the others are left out of the loss
    one = trainer(batch.select(learned))
    trusted = replace(batch, logprobs=batch.rollout_logprobs)
    assert one._check_engines(trusted, rollouts, 0) == {}
    expected = MismatchGuard(one.config).check(batch.select(learned[-2:]), [rollouts[row] for row in learned[-2:]], 0)
    assert one._check_first_minibatch(trusted, rollouts, learned, 0) == {"mismatch": expected}


def test_an_update_on_no_responses_has_no_mismatch():
    batch, rollouts = drawn(0, version=0)
    assert trainer(batch)._check_first_minibatch(batch, rollouts, [], 0) == {}


def test_while_only_the_critic_is_updated_all_responses_are_checked_before_the_update():
    batch, rollouts = drawn(0, version=0)
    one = trainer(batch, warmup=1)
    expected = MismatchGuard(one.config).check(batch, rollouts, 0)
    assert one._check_engines(batch, rollouts, 0) == {"mismatch": expected}
    assert one._check_first_minibatch(batch, rollouts, list(range(32)), 0) == {}
