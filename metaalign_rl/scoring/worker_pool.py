"""All reward workers of a run as one; a worker that dies or hangs is replaced, and its work done again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from metaalign_rl.core.dataflow import Reward, Row
from metaalign_rl.runtime.actor_calls import ActorDied, HeartbeatDeadline, first_ready, get, kill
from metaalign_rl.runtime.faults import REWARD_WORKER, ActorLost, FaultLog


@dataclass(slots=True)
class PendingScores:
    """Answers that a worker is scoring."""

    rows: list[Row]
    answers: list[str]
    number: int
    worker: Any
    scores: Any


class RewardPool:
    """The reward workers, Ray actors that each hold the whole reward model.

    Args:
        start: makes the worker of a number; it loads its model while the caller goes on.
    """

    def __init__(
        self, start: Callable[[int], Any], count: int, faults: FaultLog, patience: Callable[[], HeartbeatDeadline]
    ) -> None:
        self._start, self._faults, self._patience = start, faults, patience
        self._workers = [start(number) for number in range(count)]
        self._clocks = [patience() for _ in range(count)]
        self._turn = 0

    def __len__(self) -> int:
        return len(self._workers)

    def submit(self, rows: Sequence[Row], answers: Sequence[str]) -> PendingScores:
        """Have the next worker score answers to rows, while the caller goes on."""
        number = self._turn % len(self._workers)
        if self._turn < len(self._workers):  # it was idle, perhaps for as long as the first answers took
            self._clocks[number].reset()
        self._turn += 1
        return self._ask(number, list(rows), list(answers))

    def result(self, ticket: PendingScores) -> list[Reward]:
        """The rewards of a ticket; tickets are to be asked for in the order of `submit`.

        Raises:
            UserError: a row cannot be scored.
            TooManyFaults: workers broke again and again.
        """
        while True:
            clock = self._clocks[ticket.number]
            try:
                if first_ready([ticket.scores], clock.seconds_left()) is None:
                    raise clock.timeout_error("score")
                rewards: list[Reward] = get(ticket.scores)
            except (ActorDied, TimeoutError) as error:
                if ticket.worker is self._workers[ticket.number]:  # else another ticket has found that out
                    self._replace(ticket.number, error)
                ticket = self._ask(ticket.number, ticket.rows, ticket.answers)
            else:
                clock.record_heartbeat()
                return rewards

    def begin_step(self) -> None:
        """Deal out the next step's tickets from the first worker on."""
        self._turn = 0

    def stop(self) -> None:
        """End the workers' processes."""
        for worker in self._workers:
            kill(worker)

    def _ask(self, number: int, rows: list[Row], answers: list[str]) -> PendingScores:
        worker = self._workers[number]
        return PendingScores(rows, answers, number, worker, worker.score.remote(rows, answers))

    def _replace(self, number: int, error: BaseException) -> None:
        self._faults.record(ActorLost(f"{REWARD_WORKER} {number}", error), "a new one replaces it")
        kill(self._workers[number])
        self._workers[number] = self._start(number)
        self._clocks[number] = self._patience()
