"""Which way weights go. Light: it travels to every learner."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from metaalign_rl.config.schema import Config

Backend = Literal["store", "nccl", "ipc"]


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """From the learners to some engines.

    Attributes:
        engines: by their numbers.
        devices: of one engine.
        bucket_bytes: of weights that are on their way at a time.
        timeout_s: how long an engine may take for one call.
    """

    backend: Backend
    engines: "Mapping[int, ActorHandle]"
    devices: int
    bucket_bytes: int
    timeout_s: float


def backend_of(config: "Config") -> Backend:
    """Ray's object store on CPUs; on GPUs CUDA IPC where learners and engines share them, else NCCL."""
    if config.cluster.gpus == 0:
        return "store"
    return "ipc" if config.shares_devices else "nccl"
