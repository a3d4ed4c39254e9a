"""Records faults, actors that died or hang, and ends a run in which they repeat. Imports no heavy packages."""

import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from metaalign_rl.core.files import append_jsonl, read_log
from metaalign_rl.runtime.root_cause import root_cause

REWARD_WORKER = "reward worker"  # prefix of `ActorLost.who` for reward workers


class ActorLost(RuntimeError):
    """An actor died or hangs. It can be replaced, and its work repeated.

    Attributes:
        who: the actor, such as "rollout engine 1".
        cause: Ray's error, or a `TimeoutError` if the actor hangs.
        group: name of the actors that are always lost together, which share one fault count; empty: the actor alone.
    """

    group = ""

    def __init__(self, who: str, cause: BaseException) -> None:
        super().__init__(who, cause)  # both, because pickle calls the class with them
        self.who, self.cause = who, cause

    def __str__(self) -> str:
        return f"{self.who} is lost: {self.cause}"


class EngineLost(ActorLost):
    """A rollout engine died or hangs.

    Attributes:
        number: the engine's index in the run, from 0.
    """

    def __init__(self, number: int, cause: BaseException) -> None:
        super().__init__(f"rollout engine {number}", cause)
        self.number = number

    def __reduce__(self) -> tuple[type, tuple[int, BaseException]]:
        return EngineLost, (self.number, self.cause)


class LearnersLost(ActorLost):
    """A learner rank died or hangs. The other ranks cannot continue without it, because collectives need all ranks."""

    group = "the learners"


class StepInterrupted(RuntimeError):
    """An engine was replaced during a step, so that the step must be repeated from its start (`ppo.deterministic`)."""


class GenerationCancelled(RuntimeError):
    """A running `generate` was cancelled."""


class TooManyFaults(RuntimeError):
    """One actor was lost too often without a new step in between. The message has the last root cause."""


class FaultLog:
    """Records a run's faults in `faults.jsonl`, and ends the run if they repeat without a new step in between.

    Args:
        path: of `faults.jsonl`. Faults that it holds already are counted.
        limit: faults of one actor, or of the learners together, that a run survives without a new step in between. The
            limit is per actor because the loss of one node takes many actors with it.
        report: prints one line for the user; by default on standard error.

    Attributes:
        count: faults so far, over all resumes.
        reward_worker_count: those of reward workers.
        step: the last finished step.
    """

    def __init__(self, path: Path, limit: int, report: Callable[[str], None] | None = None) -> None:
        self._path, self._limit, self._report = path, limit, report or _to_stderr
        self._since_new_step: Counter[str] = Counter()  # by actor or group
        self._newest_step = 0
        known = [line["who"] for line in read_log(path)]
        self.count, self.reward_worker_count = len(known), sum(who.startswith(REWARD_WORKER) for who in known)
        self.step = 0

    def record(self, lost: ActorLost, action: str) -> None:
        """Write down a fault.

        Args:
            action: what is done about it, such as "a new one replaces it".

        Raises:
            TooManyFaults: the actor has had more than `limit` faults without a new step in between.
        """
        what = "hung" if isinstance(lost.cause, TimeoutError) else "died"
        cause = str(root_cause(lost.cause))
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": self.step,
            "who": lost.who,
            "what": what,
            "cause": cause,
            "action": action,
        }
        append_jsonl(self._path, line)
        self.count += 1
        self.reward_worker_count += lost.who.startswith(REWARD_WORKER)
        group = lost.group or lost.who
        self._since_new_step[group] += 1
        self._report(f"fault {self.count}, step {self.step}: {lost.who} {what} ({cause}); {action}")
        if (found := self._since_new_step[group]) > self._limit:
            raise TooManyFaults(
                f"{found} faults of {group} without a new step between them (faults.limit={self._limit}); "
                f"the last: {lost.who} {what}: {cause}"
            )

    def step_finished(self, step: int) -> None:
        """Record a finished step. Only a step that is reached for the first time resets the fault counts.

        Repeated steps do not: learners that always die at the same step repeat all steps since the last checkpoint.
        """
        self.step = step
        if step > self._newest_step:
            self._newest_step = step
            self._since_new_step.clear()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
