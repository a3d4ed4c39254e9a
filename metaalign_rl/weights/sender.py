"""The sending end of a weight sync, on every learner rank."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from metaalign_rl.weights.engine_client import EnginesClient, UpdateNotStarted
from metaalign_rl.weights.sync_plan import SyncPlan
from metaalign_rl.weights.weight_stream import WeightStream


class SyncResult(NamedTuple):
    """The result of one sync.

    Attributes:
        checksum: checksum of the sent tensors.
        taken: by engine, the version and checksum that it confirmed.
        failed: by engine, the error.
    """

    checksum: str
    taken: dict[int, tuple[int, str]]
    failed: dict[int, Exception]


class Sender:
    """Sends the policy's weights according to a plan. Exists on every rank; rank 0 sends."""

    def __init__(self, plan: SyncPlan, rank: int, passes: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        """Connect to the engines. `passes`: see `WeightStream`."""
        broadcasts = plan.backend == "nccl"
        self._client = EnginesClient(plan.engines, plan.devices, plan.timeout_s, broadcasts=broadcasts)
        self._source = WeightStream(passes, checked=rank == 0)
        self._trainer = _trainer(plan, rank, self._client, self._source)

    def send(self, version: int) -> SyncResult:
        """Give the engines the current weights as `version`. Call it on every rank."""
        self._client.version = version
        try:
            self._trainer.send_weights()
        except UpdateNotStarted:
            self._source.exhaust()  # the other ranks gather their shards all the same
        return SyncResult(self._source.checksum, self._client.taken, dict(self._client.failed))


def _trainer(plan: SyncPlan, rank: int, client: EnginesClient, source: WeightStream) -> Any:
    match plan.backend:
        case "store":
            from metaalign_rl.weights.store import StoreTrainer

            return StoreTrainer(client, source, plan.bucket_bytes, is_sender=rank == 0)
        case "nccl":
            from metaalign_rl.weights.nccl import nccl_trainer

            return nccl_trainer(plan, rank, client, source)
        case "ipc":
            from metaalign_rl.weights.ipc import ipc_trainer

            return ipc_trainer(plan, rank, client, source)
