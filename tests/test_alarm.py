"""Alarms are raised once where they should be, and not on healthy curves, however noisy."""

import numpy as np
import pytest

from metaalign_rl.monitoring import alarms
from metaalign_rl.monitoring.alarms import AlarmMonitor, find_alarms, trend

NOISE = 0.03  # standard deviation; about that of a mean over 512 responses to 128 prompts, or a bit more


def run(gold, proxy, noise=0.0, kl=None, seed=0):
    """A run's metrics with independent noise on both curves. Real noise is shared, which is easier."""
    random = np.random.default_rng(seed)
    curves = [np.clip(np.asarray(curve) + noise * random.normal(size=len(curve)), 0, 1) for curve in (gold, proxy)]
    kls = kl if kl is not None else [0.1] * len(curves[0])
    columns = zip(*curves, kls, strict=True)
    return [{"step": step, "gold": g, "proxy": p, "kl": k} for step, (g, p, k) in enumerate(columns, start=1)]


def learning(start, end, steps=65):
    """A curve like the quickstart's: it rises fast, then levels off."""
    return end - (end - start) * np.exp(-np.arange(steps) / 15)


def hacked(steps=60, fall=0.18, noise=NOISE, seed=0):
    """Thirty healthy steps. Then the proxy still rises and gold falls."""
    gold = np.concatenate([learning(0.55, 0.85, 30), np.linspace(0.85, 0.85 - fall, steps)])
    return run(gold, np.concatenate([learning(0.5, 0.85, 30), np.linspace(0.85, 0.95, steps)]), noise, seed=seed)


def test_a_proxy_that_rises_while_gold_falls_is_reported_once_with_a_remedy():
    (found,) = find_alarms(hacked())
    assert found.kind == "hacking"
    assert 30 < found.step < 75
    assert found.since < found.step
    assert str(found).startswith(f"ALARM at step {found.step}: reward hacking since step {found.since}: over ")
    assert "raise ppo.kl_coef" in str(found)


def test_reward_hacking_is_found_in_every_run_before_gold_has_fallen_much():
    runs = [find_alarms(hacked(seed=seed)) for seed in range(50)]
    assert all(runs)
    lost = [0.18 * (found[0].step - 30) / 60 for found in runs]
    assert np.median(lost) < 0.12


@pytest.mark.parametrize("noise", [0.01, NOISE, 0.08])
def test_healthy_runs_hardly_ever_raise_an_alarm(noise):
    runs = [find_alarms(run(learning(0.55, 0.93), learning(0.5, 0.94), noise, seed=seed)) for seed in range(200)]
    assert sum(map(bool, runs)) <= 1


def test_a_long_level_run_raises_no_alarm():
    assert find_alarms(run(np.full(2000, 0.9), np.linspace(0.9, 0.96, 2000), NOISE)) == []


@pytest.mark.parametrize(
    ("gold", "proxy"),
    [
        (learning(0.9, 0.6), learning(0.9, 0.5)),  # both fall: unlearning is not hacking
        (learning(0.5, 0.9), learning(0.9, 0.5)),  # gold rises
        (np.full(65, 0.9), learning(0.5, 0.9)),  # gold is constant
        (np.linspace(0.9, 0.89, 65), learning(0.5, 0.9)),  # a clear trend, but too small
    ],
)
def test_curves_that_are_not_hacking_raise_no_alarm(gold, proxy):
    assert find_alarms(run(gold, proxy, noise=0.001)) == []


def test_an_alarm_is_reported_once_and_again_if_it_returns_later():
    healthy = run(learning(0.55, 0.85, 200), learning(0.5, 0.9, 200), NOISE, seed=1)
    metrics = [{**step, "step": place} for place, step in enumerate([*hacked(), *healthy, *hacked(seed=2)], start=1)]
    found = find_alarms(metrics)
    assert [alarm.kind for alarm in found] == ["hacking", "hacking"]
    assert found[1].step > len(hacked()) + len(healthy)


def test_steps_without_gold_or_proxy_raise_no_hacking_alarm():
    assert find_alarms([{"step": step["step"], "kl": 0.1, "proxy": step["proxy"]} for step in hacked()]) == []


@pytest.mark.parametrize(
    ("kl", "alarm_at"),
    [
        ([0.0, *np.linspace(0, 0.3, 64)], None),  # healthy: slow, then level
        ([0.1] * 30 + [9.0] + [0.1] * 34, None),  # one outlier
        ([0.1] * 30 + [0.7] * 35, 32),  # far above the baseline
        ([0.4] * 30 + [0.7] * 35, None),  # above the baseline, but not far
        ([*np.linspace(0, 3, 65)], 45),  # slow, but above the absolute limit in the end
        ([0.1] * 30 + [float("nan")] * 35, 31),
    ],
)
def test_a_kl_alarm_is_raised_when_the_kl_explodes(kl, alarm_at):
    found = find_alarms(run(np.full(65, 0.9), np.full(65, 0.9), kl=kl))
    assert [(alarm.kind, alarm.step) for alarm in found] == ([] if alarm_at is None else [("kl", alarm_at)])


def test_the_monitor_knows_whether_an_alarm_is_still_active():
    monitor = AlarmMonitor()
    active = []
    for step in run(np.full(65, 0.9), np.full(65, 0.9), kl=[0.1] * 30 + [5.0] * 5 + [0.1] * 30):
        monitor.update(step)
        active.append(monitor.active)
    assert [step for step, is_active in enumerate(active, start=1) if is_active] == list(range(32, 37))


def test_a_trend_is_the_slope_of_a_line_over_its_standard_error():
    random = np.random.default_rng(0)
    values = 0.5 + 0.01 * np.arange(20) + 0.05 * random.normal(size=20)
    change, strength = trend(values)
    fit, covariance = np.polyfit(np.arange(20), values, 1, cov=True)
    assert change == pytest.approx(fit[0] * 19)
    assert strength == pytest.approx(fit[0] / covariance[0, 0] ** 0.5)


def test_noise_gives_false_trends_as_rarely_as_students_t_predicts():
    random = np.random.default_rng(0)
    strengths = [trend(random.normal(size=min(alarms.WINDOWS)))[1] for _ in range(4000)]
    quantile = -2.1009  # 2.5% of Student's t with 18 degrees of freedom
    assert np.mean(np.array(strengths) < quantile) == pytest.approx(0.025, abs=0.008)
