"""All reward workers of a run as one: chunks of responses go to them in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from metaalign_rl.core.dataflow import Ending, Reward, Row
from metaalign_rl.runtime.actor_calls import ActorDied, HeartbeatDeadline, first_ready, get
from metaalign_rl.runtime.actor_pool import ActorPool, Start
from metaalign_rl.runtime.faults import REWARD_WORKER, ActorLost, FaultLog


@dataclass(frozen=True, slots=True)
class PendingScores:
    """A call in progress, with what it takes to repeat it on another worker."""

    rows: list[Row]
    responses: list[str]
    endings: list[Ending] | None
    number: int
    worker: Any
    scores: Any


class RewardPool:
    """The reward workers, Ray actors that each hold the reward model.

    Args:
        start: starts the worker of a number without waiting until its model is loaded.
        deadline: makes a worker's heartbeat deadline.
    """

    def __init__(self, start: Start, count: int, faults: FaultLog, deadline: Callable[[], HeartbeatDeadline]) -> None:
        self._actors = ActorPool(start, count, faults, deadline)
        self._turn = 0

    def __len__(self) -> int:
        return len(self._actors)

    def submit(
        self, rows: Sequence[Row], responses: Sequence[str], endings: Sequence[Ending] | None = None
    ) -> PendingScores:
        """Send responses to rows to the next worker, without waiting for the scores; see `RewardWorker.score`."""
        number = self._turn % len(self._actors)
        if self._turn < len(self._actors):  # the worker was idle, perhaps since the last step
            self._actors.deadlines[number].reset()
        self._turn += 1
        return self._ask(number, list(rows), list(responses), None if endings is None else list(endings))

    def result(self, pending: PendingScores) -> list[Reward]:
        """The rewards of a call. Ask in the order of `submit`.

        Raises:
            UserError: a row cannot be scored.
            TooManyFaults: a worker was lost too often.
        """
        while True:
            number, deadline = pending.number, self._actors.deadlines[pending.number]
            try:
                if first_ready([pending.scores], deadline.seconds_left()) is None:
                    raise deadline.timeout_error("score")
                rewards: list[Reward] = get(pending.scores)
            except (ActorDied, TimeoutError) as error:
                self._actors.replace(number, ActorLost(f"{REWARD_WORKER} {number}", error), pending.worker)
                pending = self._ask(number, pending.rows, pending.responses, pending.endings)
            else:
                deadline.record_heartbeat()
                return rewards

    def begin_step(self) -> None:
        """Give the next step's chunks to the workers in turn, beginning with the first."""
        self._turn = 0

    def stop(self) -> None:
        """Kill the workers' processes."""
        self._actors.stop()

    def _ask(self, number: int, rows: list[Row], responses: list[str], endings: list[Ending] | None) -> PendingScores:
        worker = self._actors.actors[number]
        scores = worker.score.remote(rows, responses, endings)
        return PendingScores(rows, responses, endings, number, worker, scores)
