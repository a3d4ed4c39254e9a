"""Sending weights, as the controller sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ray.actor import ActorHandle

from metaalign_rl.config.schema import Config
from metaalign_rl.core.units import MIB
from metaalign_rl.learner.group import LearnerGroup
from metaalign_rl.weights.engine_client import failure
from metaalign_rl.weights.sender import SyncResult
from metaalign_rl.weights.sync_plan import Backend, SyncPlan, backend_of
from metaalign_rl.weights.verify import confirm


class WeightTransfer(Protocol):
    """A way from learners to engines."""

    def send(self, learners: LearnerGroup, engines: Mapping[int, ActorHandle], version: int) -> None:
        """Give each engine (by its number) the learners' present weights, bucket by bucket, as `version`.

        Engines may be generating: they pause between two steps. Call again with a new engine alone where one was
        replaced.

        Raises:
            StaleEngine: an engine took something else; it is named.
            EngineLost: an engine's process is gone, or hangs. The others have the weights, but over NCCL, where all
                wait for the lost one if it was lost on the way.
            LearnersLost: a learner's process is gone, or hangs.
        """


def make_transfer(config: Config) -> WeightTransfer:
    """The transfer that suits the run's devices."""
    rollout = config.rollout
    return LearnerTransfer(
        backend_of(config), rollout.tensor_parallel, rollout.bucket_mib * MIB, config.faults.silence_s
    )


@dataclass
class LearnerTransfer:
    """Learner rank 0 sends; all ranks gather. Only small answers pass through the caller."""

    backend: Backend
    devices: int  # of one engine
    bucket_bytes: int
    patience_s: float  # for one call of an engine
    _ends: tuple[list[ActorHandle], dict[int, ActorHandle]] | None = field(default=None, init=False)

    def send(self, learners: LearnerGroup, engines: Mapping[int, ActorHandle], version: int) -> None:
        """See `WeightTransfer.send`."""
        ends = list(learners.ranks), dict(engines)
        if self._ends != ends:  # an engine was replaced, or this is the first time
            self._ends = None
            route = SyncPlan(self.backend, ends[1], self.devices, self.bucket_bytes, self.patience_s)
            learners.call("connect_weights", route)
            self._ends = ends
        sent: SyncResult = learners.call("send_weights", version)
        for number, answer in sent.taken.items():
            confirm((version, sent.checksum), answer, engine=f"rollout engine {number}")
        for number, error in sent.failed.items():
            raise failure(number, error)
