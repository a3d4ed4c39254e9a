"""What breaks while a run goes on: how it is told from an error, counted, and when to give up. Light: no Ray."""

import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from metaalign_rl.core.files import append_jsonl, read_log
from metaalign_rl.runtime.root_cause import root_cause

REWARD_WORKER = "reward worker"  # how `who` begins where one was lost


class ActorLost(RuntimeError):
    """An actor that died or hangs: nobody's mistake, and the work can be done again by another.

    Attributes:
        who: such as "rollout engine 1".
        cause: what Ray said of it, or a `TimeoutError` where it said nothing for too long.
    """

    kin = ""  # those that are lost together, whichever of them is named

    def __init__(self, who: str, cause: BaseException) -> None:
        super().__init__(who, cause)  # both, so that it can be pickled
        self.who, self.cause = who, cause

    def __str__(self) -> str:
        return f"{self.who} is lost: {self.cause}"


class EngineLost(ActorLost):
    """A rollout engine died or hangs; `number` says which."""

    def __init__(self, number: int, cause: BaseException) -> None:
        super().__init__(f"rollout engine {number}", cause)
        self.number = number

    def __reduce__(self) -> tuple[type, tuple[int, BaseException]]:
        return EngineLost, (self.number, self.cause)


class LearnersLost(ActorLost):
    """A learner rank died or hangs, and with it the whole group: ranks meet in collective operations."""

    kin = "the learners"


class StepInterrupted(RuntimeError):
    """An engine was replaced in the middle of a step that must be done again whole (deterministic mode)."""


class GenerationCancelled(RuntimeError):
    """Answers that were being drawn are not wanted any more."""


class TooManyFaults(RuntimeError):
    """An actor was lost again and again without progress; the message has the last root cause."""


class FaultLog:
    """Counts the faults of a run, one line of `faults.jsonl` each, and gives up where they do not end.

    `count` is how many there were, over all resumes, and `of_reward` how many of them hit reward workers.

    Args:
        limit: faults of one actor, or of the learners, without a new step between them that a run survives. Of one,
            since a node that is lost takes many actors along.
        say: where a line for the user goes.
    """

    def __init__(self, path: Path, limit: int, say: Callable[[str], None] | None = None) -> None:
        self._path, self._limit, self._say = path, limit, say or _to_stderr
        self._since_progress: Counter[str] = Counter()
        self._furthest = 0
        known = [line["who"] for line in read_log(path)]
        self.count, self.of_reward = len(known), sum(who.startswith(REWARD_WORKER) for who in known)
        self.step = 0

    def record(self, lost: ActorLost, action: str) -> None:
        """Take note of a fault and of what is done about it.

        Raises:
            TooManyFaults: it was one too many.
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
        self.of_reward += lost.who.startswith(REWARD_WORKER)
        kin = lost.kin or lost.who
        self._since_progress[kin] += 1
        self._say(f"fault {self.count}, step {self.step}: {lost.who} {what} ({cause}); {action}")
        if (found := self._since_progress[kin]) > self._limit:
            raise TooManyFaults(
                f"{found} faults of {kin} without a new step between them (faults.limit={self._limit}); "
                f"the last: {lost.who} {what}: {cause}"
            )

    def progress(self, step: int) -> None:
        """A step is finished. What broke before it is overcome, unless it was finished before: learners that die at
        one step do all since the last checkpoint again each time."""
        self.step = step
        if step > self._furthest:
            self._furthest = step
            self._since_progress.clear()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
