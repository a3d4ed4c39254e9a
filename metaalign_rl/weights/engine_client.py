"""Calls to several engines at the same time: vLLM's `VLLMWeightSyncClient` for engines with numbers."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from metaalign_rl.runtime.faults import EngineLost


class UpdateNotStarted(RuntimeError):
    """An engine could not begin an update; see `EnginesClient.failed`."""


class EnginesClient:
    """Calls all engines in parallel.

    vLLM's own client gives every engine the same ranks. This one also continues when an engine fails, because the
    learners still gather shards for the others. A failed engine is not called again until the next update.

    Attributes:
        version: version of the next update.
        taken: by engine, the version and checksum that it confirmed.
        failed: by engine, the error that it raised or was lost with.
    """

    def __init__(
        self, engines: Mapping[int, ActorHandle], devices: int, timeout_s: float, *, broadcasts: bool = False
    ) -> None:
        """Nothing is called yet.

        Args:
            devices: devices per engine.
            timeout_s: seconds in a call after which an engine counts as lost.
            broadcasts: the weights are broadcast, which never ends if an engine does not take part (NCCL).
        """
        self._engines, self._devices, self._timeout_s = dict(engines), devices, timeout_s
        self._broadcasts = broadcasts
        self._calls: list[tuple[int, ray.ObjectRef]] = []  # in progress; an engine runs its calls in order
        self.version = 0
        self.taken: dict[int, tuple[int, str]] = {}
        self.failed: dict[int, Exception] = {}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect. With NCCL, each engine's devices get their own ranks; the sender is rank 0."""
        ranks = {number: 1 + place * self._devices for place, number in enumerate(self._engines)}
        for number, engine in self._engines.items():
            info = init_info | {"rank_offset": ranks[number]} if "rank_offset" in init_info else init_info
            self._calls.append((number, engine.init_weight_transfer_engine.remote(info)))
        self.wait()
        for number, error in self.failed.items():
            raise failure(number, error)

    def start_weight_update(self) -> None:
        """Pause the engines between two of their steps. Returns immediately; with `broadcasts`, when they have paused.

        Raises:
            UpdateNotStarted: an engine failed, so that a broadcast would hang.
        """
        self.failed, self.taken = {}, {}
        self._call("start_weight_update")
        if self._broadcasts:
            self.wait()
            if self.failed:
                raise UpdateNotStarted(f"engines {sorted(self.failed)} did not start the weight update")

    def update_weights(self, update_info: Any) -> None:
        """Send one bucket: the arguments of vLLM's worker, or a reference to them in Ray's object store."""
        self.begin_update(update_info)
        self.wait()

    def begin_update(self, update_info: Any) -> None:
        """`update_weights`, but returns immediately."""
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Resume the engines with the new weights, and collect their confirmations."""
        self._call("finish_weight_update", self.version)
        self.taken = self.wait()

    def wait(self) -> dict[int, Any]:
        """Wait for all calls; the engines' results of the last one."""
        answers = {}
        for number, call in self._calls:
            try:
                answers[number] = ray.get(call, timeout=self._timeout_s)
            except GetTimeoutError:
                self.failed.setdefault(number, TimeoutError(f"did not accept weights for {self._timeout_s:g} s"))
            except RayTaskError as error:
                self.failed.setdefault(number, error.cause)
            except RayActorError as error:
                self.failed.setdefault(number, error)
        self._calls = []
        return {number: answer for number, answer in answers.items() if number not in self.failed}

    def _call(self, method: str, *arguments: Any) -> None:
        left = [(number, engine) for number, engine in self._engines.items() if number not in self.failed]
        self._calls += [(number, getattr(engine, method).remote(*arguments)) for number, engine in left]


def failure(number: int, error: Exception) -> Exception:
    """The exception to raise for an engine's failed call."""
    return EngineLost(number, error) if isinstance(error, (RayActorError, TimeoutError)) else error
