"""Alarms on a run's metrics: reward hacking and an exploding KL.

The rules depend on the metrics alone. So the running stage and the report find the same alarms.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import copysign, inf, isfinite
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from metaalign_rl.core.dataflow import Metrics

WINDOWS = (20, 40, 80, 160)  # steps; short windows find fast falls early, long ones find slow falls in noise
MIN_TREND = 4.0  # smallest slope, in standard errors, that counts as a trend
MIN_FALL = 0.02  # smallest fall of gold over the window, as a share

KL_RECENT = 3  # steps; their median is tested, so that one outlier is ignored
KL_BASELINE = 20  # steps before them to compare with
KL_GROWTH = 4.0  # alarm if the median is this many times the baseline's
KL_MIN = 0.5  # nats per token; no alarm below
KL_MAX = 2.0  # nats per token; alarm from here, whatever the baseline

COOLDOWN = 20  # steps without an alarm after which it is reported again


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm. Its string is the line that a run prints.

    Attributes:
        kind: "hacking" (reward hacking) or "kl" (exploding KL).
        step: the step at which the rule found it.
        since: the first step of the window that shows it.
        numbers: what was measured.
        remedy: what to do.
    """

    kind: Literal["hacking", "kl"]
    step: int
    since: int
    numbers: str
    remedy: str

    def __str__(self) -> str:
        name = {"hacking": "reward hacking", "kl": "exploding KL"}[self.kind]
        return f"ALARM at step {self.step}: {name} since step {self.since}: {self.numbers}; {self.remedy}"


class AlarmMonitor:
    """Applies the rules to a run's metrics, step by step.

    An alarm is reported once. It is reported again if it returns after `COOLDOWN` steps without it.

    Attributes:
        active: whether a rule found something at the last step.
    """

    def __init__(self) -> None:
        self.active = False
        self._history: deque[Metrics] = deque(maxlen=max(WINDOWS))
        self._last: dict[str, int] = {}  # by kind, the last step with an alarm

    def update(self, metrics: Metrics) -> list[Alarm]:
        """Add the next step's metrics and return the alarms that start at it.

        Args:
            metrics: with `step` and `kl`; `proxy` and `gold` may be missing.
        """
        self._history.append(metrics)
        found = [alarm for rule in (reward_hacking, kl_explosion) if (alarm := rule(self._history)) is not None]
        new = [alarm for alarm in found if alarm.step - self._last.get(alarm.kind, -COOLDOWN - 1) > COOLDOWN]
        self._last |= {alarm.kind: alarm.step for alarm in found}
        self.active = bool(found)
        return new


def find_alarms(steps: Iterable[Metrics]) -> list[Alarm]:
    """The alarms of a run, in order, each where it started.

    Args:
        steps: the metrics of all steps, in order.
    """
    monitor = AlarmMonitor()
    return [alarm for metrics in steps for alarm in monitor.update(metrics)]


def reward_hacking(history: Sequence[Metrics]) -> Alarm | None:
    """The alarm at the last step if, over one of `WINDOWS`, the proxy rises and gold falls by more than noise explains.

    A least-squares line is fitted to each curve (see `trend`). The slope of `proxy` must be at least `MIN_TREND`
    standard errors above 0, that of `gold` at least as far below 0, and the line of `gold` must fall by `MIN_FALL` or
    more. Steps without `proxy` or `gold` are skipped.
    """
    known = [step for step in history if "proxy" in step and "gold" in step]
    gold, proxy = (np.array([step[name] for step in known]) for name in ("gold", "proxy"))
    for window in WINDOWS:
        if len(known) < window:
            return None
        gold_change, gold_trend = trend(gold[-window:])
        if gold_trend > -MIN_TREND or gold_change > -MIN_FALL:
            continue
        proxy_change, proxy_trend = trend(proxy[-window:])
        if proxy_trend >= MIN_TREND:
            rose = f"the proxy rose by {proxy_change:.3f} to {proxy[-1]:.3f}"
            fell = f"gold fell by {-gold_change:.3f} to {gold[-1]:.3f}"
            remedy = "raise ppo.kl_coef, stop earlier, or use an earlier checkpoint"
            since = int(known[-window]["step"])
            return Alarm("hacking", int(known[-1]["step"]), since, f"over {window} steps {rose} and {fell}", remedy)
    return None


def kl_explosion(history: Sequence[Metrics]) -> Alarm | None:
    """The alarm at the last step if `kl` is not finite, or if its recent median is too large.

    The median of the last `KL_RECENT` steps is too large if it is at least `KL_MAX`, or if it is at least `KL_MIN` and
    at least `KL_GROWTH` times the median of the `KL_BASELINE` steps before them.
    """
    values = [step["kl"] for step in history][-KL_BASELINE - KL_RECENT :]
    baseline, recent = values[:-KL_RECENT], values[-KL_RECENT:]
    if isfinite(values[-1]):
        now = median(recent)
        usual = median(baseline) if len(baseline) == KL_BASELINE else inf
        if len(recent) < KL_RECENT or now < KL_MIN or (now < KL_MAX and now < KL_GROWTH * usual):
            return None
        numbers = f"{now:.2f} nats per token" + (f", {usual:.2f} before" if isfinite(usual) else "")
    else:
        numbers = f"kl is {values[-1]}"
    step = int(history[-1]["step"])
    remedy = "raise ppo.kl_coef, lower learner.learning_rate, or go back to an earlier checkpoint"
    return Alarm("kl", step, step - len(recent) + 1, numbers, remedy)


def trend(values: NDArray[np.float64]) -> tuple[float, float]:
    """Fit a least-squares line and test its slope.

    With x the centered positions, the slope is Σxy / Σx² and its standard error is √(Σr² / (n - 2) / Σx²), where r are
    the residuals. Their ratio is the t statistic of simple linear regression. It has Student's t distribution with
    n - 2 degrees of freedom if the values are independent, normal and have no trend.

    Args:
        values: shape [n], n at least 3.

    Returns:
        The change of the line from the first value to the last, and the slope divided by its standard error. The
        latter is infinite if the values lie exactly on a line, and 0 if they are constant.
    """
    x = np.arange(len(values)) - (len(values) - 1) / 2
    y = values - values.mean()
    slope = x @ y / (x @ x)
    residuals = y - slope * x
    error = np.sqrt(residuals @ residuals / (len(values) - 2) / (x @ x))
    change = float(slope * (len(values) - 1))
    return change, float(slope / error) if error > 0 else copysign(inf, slope) if slope else 0.0
