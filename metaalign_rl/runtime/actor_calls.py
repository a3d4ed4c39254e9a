"""What all of a run's actors have in common: waiting for them, and telling that one is lost."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError


class ActorDied(RuntimeError):
    """An actor's process or node is gone; Ray's error is the cause."""


def get(ref: Any) -> Any:
    """What `ray.get` gives.

    Raises:
        Gone: the process that was to answer is no more. What its own code raised, in `__init__` too, is no such case.
    """
    try:
        return ray.get(ref)
    except (RayActorError, WorkerCrashedError, ObjectLostError) as error:
        if getattr(error, "actor_init_failed", False):
            raise
        raise ActorDied(str(error).partition("\n")[0]) from error


def kill(actor: Any) -> None:
    """End an actor's process at once, whatever it does, if it still lives."""
    ray.kill(actor, no_restart=True)


class HeartbeatDeadline:
    """How long an actor may say nothing: longer while it starts, since it loads a model then.

    Args:
        start, silence: seconds, before and after it was first heard of.

    Attributes:
        has_started: whether it was heard of.
    """

    def __init__(self, start: float, silence: float) -> None:
        self._start, self._silence = start, silence
        self._last = time.monotonic()
        self._limit = start
        self.has_started = False

    def heard(self) -> None:
        """It has given a sign of life."""
        self._last, self._limit = time.monotonic(), self._silence
        self.has_started = True

    def began(self) -> None:
        """It was idle until now."""
        self._last = time.monotonic()

    def left(self) -> float:
        """Seconds until it is taken for hung; 0 or less: it is."""
        return self._last + self._limit - time.monotonic()

    def error(self, method: str) -> TimeoutError:
        """What to say of one that was silent for too long."""
        setting = "silence_s" if self.has_started else "start_s"
        silence = time.monotonic() - self._last
        return TimeoutError(f"no sign of life for {silence:.0f} s in {method} (faults.{setting}={self._limit:g})")


def first_ready(refs: Sequence[Any], timeout: float) -> Any | None:
    """The first of `refs`, objects or streams, that has something; None after `timeout` seconds."""
    ready, _ = ray.wait(list(refs), num_returns=1, timeout=max(0.0, timeout))
    return ready[0] if ready else None


def follow(streams: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """What several actors' streams yield, as it comes, with the stream's place.

    An error of any stream is raised at once: the others may wait for that actor, an hour long.
    """
    places = {stream: place for place, stream in enumerate(streams)}
    while places:
        (stream,), _ = ray.wait(list(places), num_returns=1)
        try:
            update = ray.get(next(stream))
        except StopIteration:
            del places[stream]
        else:
            yield places[stream], update
