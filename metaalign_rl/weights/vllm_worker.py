"""The engine's end of a transfer: runs in each of vLLM's workers, beside the weights, one on every device.

vLLM's own life cycle, `start_weight_update`, `update_weights` for each bucket, `finish_weight_update`, and its own NCCL
and IPC engines, which here also take the checksum of what they hand to the model's loader. The third engine takes
buckets from Ray's object store. Importing this module registers them; vLLM imports it in every worker, by the name of
the extension, before it makes the engine.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.model_loader import reload

from metaalign_rl.core.checkpoints import tensors_of
from metaalign_rl.weights.buckets import Bucket, Entry, unpack
from metaalign_rl.weights.checksum import Digest

if TYPE_CHECKING:
    import numpy as np

PREFIX = "checked_"  # before a backend's name: vLLM's registry has the plain ones


class Receipt(NamedTuple):
    """What a device's loader took: the checksum, and the tensors' names."""

    checksum: str
    names: set[str]


class Watched:
    """A model whose loader also feeds a digest."""

    def __init__(self, model: Any, digest: Digest) -> None:
        self._model, self._digest = model, digest

    def load_weights(self, weights: Any) -> Any:
        """The model's own, on the same tensors."""
        return self._model.load_weights(self._digest.watch(weights))


class Checked:
    """Mixed in before one of vLLM's transfer engines: `digest` covers what the loader took since the last start."""

    model: Any
    digest: Digest

    def start_weight_update(self) -> None:
        self.digest = Digest()
        super().start_weight_update()  # type: ignore[misc]

    def receive_weights(self, update_info: Any) -> None:
        model, self.model = self.model, Watched(self.model, self.digest)
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model


class NCCLReceiver(Checked, NCCLWeightTransferEngine):
    """vLLM's engine for weights that come over NCCL."""


class IPCReceiver(Checked, IPCWeightTransferEngine):
    """vLLM's engine for weights that lie on the same GPU."""


@dataclass
class StoreInitInfo(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class StoreUpdateInfo(WeightTransferUpdateInfo):
    """The fields of a `Bucket`."""

    entries: list[Entry]
    data: "np.ndarray"


class StoreEngine(WeightTransferEngine[StoreInitInfo, StoreUpdateInfo]):
    """Takes buckets that Ray's object store passed to the engine's process."""

    init_info_cls = StoreInitInfo
    update_info_cls = StoreUpdateInfo

    def init_transfer_engine(self, init_info: StoreInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Let the model take a checkpoint's tensors again, layer by layer."""
        reload.initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: StoreUpdateInfo) -> None:
        """Load a bucket."""
        self.model.load_weights(unpack(Bucket(update_info.entries, update_info.data)))

    def finish_weight_update(self) -> None:
        """Put the layers' processed weights in place."""
        reload.finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to close."""


class StoreReceiver(Checked, StoreEngine):
    """The same, checked."""


class WeightReceiver:
    """Mixed into vLLM's worker class by name (`worker_extension_cls`)."""

    weight_transfer_engine: Any
    reload_weights: Any

    def weights_receipt(self) -> Receipt:
        """Of the update under way, or the last one."""
        digest = self.weight_transfer_engine.digest
        return Receipt(digest.hexdigest(), digest.names)

    def load_checkpoint_weights(self, path: str) -> Receipt:
        """Load a checkpoint's folder into this device's model."""
        digest = Digest()
        self.reload_weights(weights_iterator=digest.watch(tensors_of(Path(path))))
        return Receipt(digest.hexdigest(), digest.names)


for name, engine in (("store", StoreReceiver), ("nccl", NCCLReceiver), ("ipc", IPCReceiver)):
    WeightTransferEngineFactory.register_engine(PREFIX + name, engine)
