"""Measures how long each part of a step takes."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class StepTimer:
    """Seconds of a step by part, from construction on.

    Attributes:
        seconds: by part, such as "rollout".
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside to the part `name`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add({name: time.monotonic() - began})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds that were measured elsewhere since construction."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def metrics(self) -> dict[str, float]:
        """`seconds_NAME` of each part, `seconds_idle` (the rest) and `seconds_step` (the sum)."""
        total = time.monotonic() - self._began
        parts = {**self.seconds, "idle": max(0.0, total - sum(self.seconds.values()))}
        return {**{f"seconds_{name}": value for name, value in parts.items()}, "seconds_step": sum(parts.values())}
