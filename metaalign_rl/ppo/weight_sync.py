"""Weight sync: after each update, every rollout engine gets the learners' weights.

WeightSync.push ─> Learner.send_weights (each rank) ─> weights.sender ─> RolloutEngine.update_weights
  controller        learner processes                   store, nccl, ipc   engine processes
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from metaalign_rl.config.schema import Config
from metaalign_rl.core.units import MIB
from metaalign_rl.learner.group import LearnerGroup
from metaalign_rl.rollout.engine_actors import EngineActors
from metaalign_rl.weights import confirm
from metaalign_rl.weights.engine_client import failure
from metaalign_rl.weights.sender import SyncResult
from metaalign_rl.weights.sync_plan import Backend, SyncPlan, backend_of


@dataclass
class WeightSync:
    """Sends weights from the learners to the engines. Learner rank 0 sends; with ZeRO-3 all ranks gather first.

    Attributes:
        devices: devices of one engine.
        bucket_bytes: bytes of weights in flight at a time.
        timeout_s: seconds for one call of an engine, after which the engine counts as lost.
        version: version of the weights that were pushed last; the learners' number of updates.
    """

    learners: LearnerGroup
    engines: EngineActors
    backend: Backend
    devices: int
    bucket_bytes: int
    timeout_s: float
    version: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)  # an engine takes one update at a time
    _connected: tuple[list[Any], dict[int, Any]] | None = field(default=None, init=False)  # learner ranks, engines

    @classmethod
    def of(cls, config: Config, learners: LearnerGroup, engines: EngineActors) -> "WeightSync":
        """The weight sync of a run."""
        rollout, timeout = config.rollout, config.faults.silence_s
        return cls(learners, engines, backend_of(config), rollout.tensor_parallel, rollout.bucket_mib * MIB, timeout)

    def push(self, version: int) -> None:
        """Give every engine the learners' weights as `version`. Returns when all engines have confirmed them.

        Engines may be generating: they pause between two of their steps. Lost engines are replaced.

        Raises:
            StaleEngine: an engine holds other weights than it was sent.
            LearnersLost: a learner rank died or hangs.
            TooManyFaults: an engine was lost too often.
        """
        with self._lock:
            self.version = version
            self._update_engines()
            self._update_replacements()

    def repair(self) -> None:
        """Give the current weights to engines that were started after the last push. It raises as `push` does."""
        with self._lock:
            self._update_replacements()

    def send(self, engines: Mapping[int, Any]) -> None:
        """Send the current version to `engines`, once.

        Raises:
            EngineLost: an engine died or hangs. The others have the weights, except with NCCL: there all wait for an
                engine that is lost during the broadcast.
            StaleEngine, LearnersLost: see `push`.
        """
        ends = list(self.learners.ranks), dict(engines)
        if self._connected != ends:  # the first time, or after an actor was replaced
            self._connected = None
            plan = SyncPlan(self.backend, ends[1], self.devices, self.bucket_bytes, self.timeout_s)
            self.learners.call("connect_weights", plan)
            self._connected = ends
        result: SyncResult = self.learners.call("send_weights", self.version)
        for number, answer in result.taken.items():
            confirm((self.version, result.checksum), answer, engine=f"rollout engine {number}")
        for number, error in result.failed.items():
            raise failure(number, error)

    def _update_replacements(self) -> None:
        while not self.engines.all_serve:
            self._update_engines()

    def _update_engines(self) -> None:
        with self.engines.updating() as engines:
            self.send(engines)
