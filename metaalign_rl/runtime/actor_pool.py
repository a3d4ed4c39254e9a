"""Actors of one kind: started, watched for heartbeats, and replaced when one is lost."""

import threading
from collections.abc import Callable
from typing import Any

from metaalign_rl.runtime.actor_calls import HeartbeatDeadline, kill
from metaalign_rl.runtime.faults import ActorLost, FaultLog

Start = Callable[[int], Any]


class ActorPool:
    """Ray actors, by number.

    Args:
        start: starts the actor of a number and returns its handle without waiting until its model is loaded.
        count: number of actors.
        faults: records each actor that is lost.
        deadline: makes the heartbeat deadline of a new actor.

    Attributes:
        actors: handle by number. A replacement may still be loading.
        deadlines: heartbeat deadline by number.
    """

    def __init__(self, start: Start, count: int, faults: FaultLog, deadline: Callable[[], HeartbeatDeadline]) -> None:
        self._start, self._faults, self._deadline = start, faults, deadline
        self._replacing = threading.Lock()
        self.actors: dict[int, Any] = {}
        self.deadlines: dict[int, HeartbeatDeadline] = {}
        for number in range(count):
            self._launch(number)

    def __len__(self) -> int:
        return len(self.actors)

    def replace(self, number: int, lost: ActorLost, actor: Any) -> bool:
        """Start a new actor in place of `actor`; False if another thread has replaced it already.

        Raises:
            TooManyFaults: this actor was lost too often.
        """
        with self._replacing:
            if self.actors[number] is not actor:
                return False
            self._faults.record(lost, "starting a replacement")
            kill(actor)
            self._launch(number)
            return True

    def stop(self) -> None:
        """Kill the actors' processes."""
        for actor in self.actors.values():
            kill(actor)

    def _launch(self, number: int) -> None:
        self.actors[number] = self._start(number)
        self.deadlines[number] = self._deadline()
