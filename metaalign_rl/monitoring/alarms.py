"""Alarms over a run's curves: reward hacking, and a KL that explodes.

Pure functions of the metrics: the run prints an alarm as it goes, and its report finds the same ones again.
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

WINDOWS = (20, 40, 80, 160)  # steps: a short one sees a fast fall early, a long one a slow fall through the noise
TREND = 4.0  # a line's slope over its standard error, from which on it is a trend and no noise
LEAST_FALL = 0.02  # of gold over the window, as a share; less is no matter, however sure it is

KL_STEPS = 3  # the last steps' median counts, so that one odd step is none
KL_BEFORE = 20  # steps before them, to compare with
KL_GROWTH = 4.0  # so many times what it was,
KL_LEAST = 0.5  # and at least this, in nats a token; less can be undone
KL_MOST = 2.0  # nats a token: there, whatever it was before, hardly an answer is one that the reference would give

QUIET = 20  # steps without an alarm that end an episode


@dataclass(frozen=True, slots=True)
class Alarm:
    """What is wrong at a step.

    Attributes:
        step: the step at which it showed.
        since: the first step of the curve that shows it.
    """

    kind: Literal["hacking", "kl"]
    step: int
    since: int
    numbers: str
    remedy: str

    def __str__(self) -> str:
        what = {"hacking": "the proxy rises while gold falls (reward hacking)", "kl": "the KL explodes"}[self.kind]
        return f"ALARM at step {self.step}: {what} since step {self.since}: {self.numbers}; {self.remedy}"


class AlarmMonitor:
    """Takes in one step's metrics after the other and says which alarms begin.

    An alarm that goes on is one episode and is told once; it is over when `QUIET` steps passed without it.

    Attributes:
        ringing: whether something is wrong at the last step.
    """

    def __init__(self) -> None:
        self.ringing = False
        self._history: deque[Metrics] = deque(maxlen=max(WINDOWS))
        self._last: dict[str, int] = {}  # the last step with an alarm of a kind

    def __call__(self, metrics: Metrics) -> list[Alarm]:
        """The alarms that begin at this step."""
        self._history.append(metrics)
        found = [alarm for rule in (hacking, kl_explosion) if (alarm := rule(self._history)) is not None]
        new = [alarm for alarm in found if alarm.step - self._last.get(alarm.kind, -QUIET - 1) > QUIET]
        self._last |= {alarm.kind: alarm.step for alarm in found}
        self.ringing = bool(found)
        return new


def episodes(steps: Iterable[Metrics]) -> list[Alarm]:
    """The alarms of a whole run, each where it began."""
    watch = AlarmMonitor()
    return [alarm for metrics in steps for alarm in watch(metrics)]


def hacking(history: Sequence[Metrics]) -> Alarm | None:
    """Whether, over one of `WINDOWS`, the proxy rises and gold falls, both by more than noise explains.

    A least-squares line is laid through each curve; its slope must be `TREND` standard errors from 0, and gold's
    line must fall by `LEAST_FALL`. Steps without either figure do not count.
    """
    known = [step for step in history if "proxy" in step and "gold" in step]
    gold, proxy = (np.array([step[name] for step in known]) for name in ("gold", "proxy"))
    for window in WINDOWS:
        if len(known) < window:
            return None
        fall, fell = trend(gold[-window:])
        if fell > -TREND or fall > -LEAST_FALL:
            continue
        rise, rose = trend(proxy[-window:])
        if rose >= TREND:
            numbers = f"over {window} steps the proxy rose by {rise:.3f} to {proxy[-1]:.3f}, gold fell by {-fall:.3f}"
            remedy = "raise ppo.kl_coef, stop earlier, or use the checkpoint from before"
            since = int(known[-window]["step"])
            return Alarm("hacking", int(known[-1]["step"]), since, f"{numbers} to {gold[-1]:.3f}", remedy)
    return None


def kl_explosion(history: Sequence[Metrics]) -> Alarm | None:
    """Whether the KL to the reference ran away: far above what it was shortly before, above any sense, or no number."""
    values = [step["kl"] for step in history][-KL_BEFORE - KL_STEPS :]
    before, last = values[:-KL_STEPS], values[-KL_STEPS:]
    if isfinite(values[-1]):
        now = median(last)
        usual = median(before) if len(before) == KL_BEFORE else inf
        if len(last) < KL_STEPS or now < KL_LEAST or (now < KL_MOST and now < KL_GROWTH * usual):
            return None
        numbers = f"{now:.2f} nats a token" + (f", before {usual:.2f}" if isfinite(usual) else "")
    else:
        numbers = "it is no number"
    step = int(history[-1]["step"])
    remedy = "raise ppo.kl_coef, lower learner.learning_rate, or go back to the checkpoint from before"
    return Alarm("kl", step, step - len(last) + 1, numbers, remedy)


def trend(values: NDArray[np.float64]) -> tuple[float, float]:
    """The change over the values of a least-squares line through them, and its slope over its standard error.

    The latter is Student's t with n - 2 degrees of freedom where the values are independent and do not change.
    """
    place = np.arange(len(values)) - (len(values) - 1) / 2
    centred = values - values.mean()
    slope = place @ centred / (place @ place)
    rest = centred - slope * place
    error = np.sqrt(rest @ rest / (len(values) - 2) / (place @ place))
    change = float(slope * (len(values) - 1))
    return change, float(slope / error) if error > 0 else copysign(inf, slope) if slope else 0.0
