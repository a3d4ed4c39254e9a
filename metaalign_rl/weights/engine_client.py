"""The sender's view of the engines: vLLM's `VLLMWeightSyncClient` over several engines with a number each."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from metaalign_rl.runtime.faults import EngineLost


class EnginesClient:
    """Calls all engines side by side.

    vLLM's own client gives every engine the same ranks. This one also goes on where an engine fails, since the learners
    gather shards for the others: what failed stands in `failed`, and is not called again until the next update.

    Attributes:
        version: of the next update.
        taken: by engine, the version and checksum that it confirmed.
        failed: by engine, what it raised, or the error that says that it is gone.
    """

    def __init__(self, engines: Mapping[int, ActorHandle], devices: int, timeout_s: float) -> None:
        """`devices`: of one engine; `timeout_s`: for one of its calls, after which it counts as lost."""
        self._engines, self._devices, self._timeout_s = dict(engines), devices, timeout_s
        self._calls: list[tuple[int, ray.ObjectRef]] = []  # under way; an engine does its own in order
        self.version = 0
        self.taken: dict[int, tuple[int, str]] = {}
        self.failed: dict[int, Exception] = {}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect; over NCCL each engine's devices are ranks of their own, after the sender's 0."""
        ranks = {number: 1 + place * self._devices for place, number in enumerate(self._engines)}
        for number, engine in self._engines.items():
            info = init_info | {"rank_offset": ranks[number]} if "rank_offset" in init_info else init_info
            self._calls.append((number, engine.init_weight_transfer_engine.remote(info)))
        self.wait()
        for number, error in self.failed.items():
            raise failure(number, error)

    def start_weight_update(self) -> None:
        """Have the engines pause between two of their steps; returns at once."""
        self.failed, self.taken = {}, {}
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """One bucket: what vLLM's worker takes, or where that lies in Ray's object store."""
        self.begin_update(update_info)
        self.wait()

    def begin_update(self, update_info: Any) -> None:
        """The same, but returns at once."""
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let the engines go on with the new weights; they answer with what they took."""
        self._call("finish_weight_update", self.version)
        self.taken = self.wait()

    def wait(self) -> dict[int, Any]:
        """The engines' answers to the last call, once all calls are done."""
        answers = {}
        for number, call in self._calls:
            try:
                answers[number] = ray.get(call, timeout=self._timeout_s)
            except GetTimeoutError:
                self.failed.setdefault(number, TimeoutError(f"weights not taken for {self._timeout_s:g} s"))
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
    """What to raise where an engine's call ended in `error`."""
    return EngineLost(number, error) if isinstance(error, (RayActorError, TimeoutError)) else error
