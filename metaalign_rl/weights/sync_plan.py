"""The plan of a weight sync. Every learner rank gets it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from metaalign_rl.config.schema import Config

Backend = Literal["store", "nccl", "ipc"]


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """A weight sync from the learners to some engines.

    Attributes:
        engines: actor handle by engine number.
        devices: devices of one engine.
        bucket_bytes: bytes of weights in flight at a time.
        timeout_s: seconds that an engine may take for one call.
    """

    backend: Backend
    engines: "Mapping[int, ActorHandle]"
    devices: int
    bucket_bytes: int
    timeout_s: float


def backend_of(config: "Config") -> Backend:
    """Ray's object store on CPUs; on GPUs, CUDA IPC if learners and engines share them, else NCCL."""
    if config.cluster.gpus == 0:
        return "store"
    return "ipc" if config.shares_devices else "nccl"
