"""The alarms ring where they should, once, and not on healthy curves however noisy."""

import numpy as np
import pytest

from metaalign_rl.monitoring import alarms
from metaalign_rl.monitoring.alarms import AlarmMonitor, episodes, trend

NOISE = 0.03  # of a mean over 512 answers to 128 prompts, or a bit more


def run(gold, proxy, noise=0.0, kl=None, seed=0):
    """A run's metrics with independent noise on both curves, which is harder than the real, shared one."""
    random = np.random.default_rng(seed)
    curves = [np.clip(np.asarray(curve) + noise * random.normal(size=len(curve)), 0, 1) for curve in (gold, proxy)]
    kls = kl if kl is not None else [0.1] * len(curves[0])
    columns = zip(*curves, kls, strict=True)
    return [{"step": step, "gold": g, "proxy": p, "kl": k} for step, (g, p, k) in enumerate(columns, start=1)]


def learning(start, end, steps=65):
    """A curve as the quickstart's: fast first, then level."""
    return end - (end - start) * np.exp(-np.arange(steps) / 15)


def hacked(steps=60, fall=0.18, noise=NOISE, seed=0):
    """Thirty healthy steps, then the proxy goes on rising and gold falls."""
    gold = np.concatenate([learning(0.55, 0.85, 30), np.linspace(0.85, 0.85 - fall, steps)])
    return run(gold, np.concatenate([learning(0.5, 0.85, 30), np.linspace(0.85, 0.95, steps)]), noise, seed=seed)


def test_a_proxy_that_rises_while_gold_falls_rings_once_and_says_what_to_do():
    (found,) = episodes(hacked())
    assert found.kind == "hacking"
    assert 30 < found.step < 75
    assert found.since < found.step
    assert "the proxy rises while gold falls" in str(found)
    assert "raise ppo.kl_coef" in str(found)


def test_it_is_seen_in_nearly_every_run_before_gold_has_lost_much():
    rang = [episodes(hacked(seed=seed)) for seed in range(50)]
    assert all(rang)
    lost = [0.18 * (found[0].step - 30) / 60 for found in rang]
    assert np.median(lost) < 0.12


@pytest.mark.parametrize("noise", [0.01, NOISE, 0.08])
def test_healthy_runs_hardly_ever_ring(noise):
    rang = [episodes(run(learning(0.55, 0.93), learning(0.5, 0.94), noise, seed=seed)) for seed in range(200)]
    assert sum(map(bool, rang)) <= 1


def test_a_long_level_run_does_not_ring():
    assert episodes(run(np.full(2000, 0.9), np.linspace(0.9, 0.96, 2000), NOISE)) == []


@pytest.mark.parametrize(
    ("gold", "proxy"),
    [
        (learning(0.9, 0.6), learning(0.9, 0.5)),  # both fall: it unlearns, which is no hacking
        (learning(0.5, 0.9), learning(0.9, 0.5)),  # gold rises
        (np.full(65, 0.9), learning(0.5, 0.9)),  # gold is level
        (np.linspace(0.9, 0.89, 65), learning(0.5, 0.9)),  # sure, but too small to matter
    ],
)
def test_what_is_no_hacking_does_not_ring_as_it(gold, proxy):
    assert episodes(run(gold, proxy, noise=0.001)) == []


def test_an_episode_is_told_once_and_a_second_one_again():
    healthy = run(learning(0.55, 0.85, 200), learning(0.5, 0.9, 200), NOISE, seed=1)
    metrics = [{**step, "step": place} for place, step in enumerate([*hacked(), *healthy, *hacked(seed=2)], start=1)]
    found = episodes(metrics)
    assert [one.kind for one in found] == ["hacking", "hacking"]
    assert found[1].step > len(hacked()) + len(healthy)


def test_steps_without_gold_or_proxy_never_ring_as_hacking():
    assert episodes([{"step": step["step"], "kl": 0.1, "proxy": step["proxy"]} for step in hacked()]) == []


@pytest.mark.parametrize(
    ("kl", "rings_at"),
    [
        ([0.0, *np.linspace(0, 0.3, 64)], None),  # as it should: slow, and level in the end
        ([0.1] * 30 + [9.0] + [0.1] * 34, None),  # one odd step
        ([0.1] * 30 + [0.7] * 35, 32),  # far above what it was
        ([0.4] * 30 + [0.7] * 35, None),  # more than it was, but not by far
        ([*np.linspace(0, 3, 65)], 45),  # slow, but at last above any sense
        ([0.1] * 30 + [float("nan")] * 35, 31),
    ],
)
def test_a_kl_rings_when_it_explodes(kl, rings_at):
    found = episodes(run(np.full(65, 0.9), np.full(65, 0.9), kl=kl))
    assert [(one.kind, one.step) for one in found] == ([] if rings_at is None else [("kl", rings_at)])


def test_the_watch_says_whether_it_still_rings():
    watch = AlarmMonitor()
    rang = []
    for step in run(np.full(65, 0.9), np.full(65, 0.9), kl=[0.1] * 30 + [5.0] * 5 + [0.1] * 30):
        watch(step)
        rang.append(watch.ringing)
    assert [place for place, ringing in enumerate(rang, start=1) if ringing] == list(range(32, 37))


def test_a_trend_is_a_lines_slope_over_its_standard_error():
    random = np.random.default_rng(0)
    values = 0.5 + 0.01 * np.arange(20) + 0.05 * random.normal(size=20)
    change, strength = trend(values)
    fit, covariance = np.polyfit(np.arange(20), values, 1, cov=True)
    assert change == pytest.approx(fit[0] * 19)
    assert strength == pytest.approx(fit[0] / covariance[0, 0] ** 0.5)


def test_the_windows_noise_gives_false_trends_as_rarely_as_students_t_says():
    random = np.random.default_rng(0)
    strengths = [trend(random.normal(size=min(alarms.WINDOWS)))[1] for _ in range(4000)]
    assert np.mean(np.array(strengths) < -2.1009) == pytest.approx(0.025, abs=0.008)  # t of 18 degrees, one side
