"""Calls of Ray actors: wait for results, and detect actors that died or hang."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError


class ActorDied(RuntimeError):
    """An actor's process or node is gone. Ray's error is the `__cause__`."""


def get(ref: Any) -> Any:
    """The result of `ray.get`.

    Raises:
        ActorDied: the actor's process is gone. An exception of the actor's own code, also in `__init__`, is raised as
            it is.
    """
    try:
        return ray.get(ref)
    except (RayActorError, WorkerCrashedError, ObjectLostError) as error:
        if getattr(error, "actor_init_failed", False):
            raise
        raise ActorDied(str(error).partition("\n")[0]) from error


def kill(actor: Any) -> None:
    """Kill an actor's process immediately, if it is still alive."""
    ray.kill(actor, no_restart=True)


class HeartbeatDeadline:
    """The time by which an actor must send its next heartbeat, or count as hung.

    The timeout is longer before the first heartbeat, because the actor loads its model then.

    Args:
        start_timeout: seconds, until the first heartbeat (`faults.start_s`).
        timeout: seconds, after each heartbeat (`faults.silence_s`).

    Attributes:
        has_started: the actor has sent a heartbeat.
    """

    def __init__(self, start_timeout: float, timeout: float) -> None:
        self._start_timeout, self._timeout = start_timeout, timeout
        self.has_started = False
        self.reset()

    def record_heartbeat(self) -> None:
        """Record that the actor is alive."""
        self.has_started = True
        self.reset()

    def reset(self) -> None:
        """Start the timeout again; call it when an idle actor gets work."""
        self._since = time.monotonic()

    def seconds_left(self) -> float:
        """Seconds until the actor counts as hung; 0 or less: it does."""
        return self._since + self._limit - time.monotonic()

    def timeout_error(self, method: str) -> TimeoutError:
        """The error to raise for a hung actor.

        Args:
            method: the actor's method that sent no heartbeat.
        """
        setting = "silence_s" if self.has_started else "start_s"
        silence = time.monotonic() - self._since
        return TimeoutError(f"no heartbeat for {silence:.0f} s in {method} (faults.{setting}={self._limit:g})")

    @property
    def _limit(self) -> float:
        return self._timeout if self.has_started else self._start_timeout


def first_ready(refs: Sequence[Any], timeout: float) -> Any | None:
    """The first of `refs`, objects or streams, that has a result; None after `timeout` seconds."""
    ready, _ = ray.wait(list(refs), num_returns=1, timeout=max(0.0, timeout))
    return ready[0] if ready else None


def merge_streams(streams: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Yield the items of several actors' streams as they arrive, each with the index of its stream.

    An error of any stream is raised immediately: the other actors may wait for the failed one for an hour.
    """
    indices = {stream: index for index, stream in enumerate(streams)}
    while indices:
        (stream,), _ = ray.wait(list(indices), num_returns=1)
        try:
            item = ray.get(next(stream))
        except StopIteration:
            del indices[stream]
        else:
            yield indices[stream], item
