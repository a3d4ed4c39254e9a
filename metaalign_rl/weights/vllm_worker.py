"""The receiving end of a weight sync. It runs in each of vLLM's workers, one per device.

It follows vLLM's own life cycle: `start_weight_update`, `update_weights` per bucket, `finish_weight_update`. vLLM's
NCCL and IPC engines are extended to compute the checksum of the tensors that they hand to the model's loader. A third
engine receives buckets from Ray's object store. Importing this module registers all three. vLLM imports it in every
worker, by the name of the worker extension, before it creates the engine.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from metaalign_rl.core.checkpoints import tensors_of
from metaalign_rl.weights.buckets import Bucket, Entry, unpack
from metaalign_rl.weights.checksum import Digest

if TYPE_CHECKING:
    import numpy as np

PREFIX = "checked_"  # vLLM's registry already has the plain names


def process_tied_layers_again(model: torch.nn.Module) -> None:
    """Make vLLM process tied output layers at the end of the next reload. Call this before the reload begins.

    A tied output layer has no tensor of its own to load: it shares the embedding's. But on a CPU vLLM computes with a
    packed copy of that tensor, made when a layer is processed, and a reload skips layers that get no tensor. vLLM does
    process a layer that has begun to load and keeps its tensors, so the tied layers are marked as such.
    """
    layers = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    shared = {id(layer.weight) for layer in layers if not isinstance(layer, ParallelLMHead)}
    for layer in layers:
        if isinstance(layer, ParallelLMHead) and id(layer.weight) in shared:
            get_layerwise_info(layer).load_numel_total = 0


class Receipt(NamedTuple):
    """Checksum and names of the tensors that a device's loader received."""

    checksum: str
    names: set[str]


class ChecksummedModel:
    """A model whose loader also updates a checksum."""

    def __init__(self, model: Any, digest: Digest) -> None:
        self._model, self._digest = model, digest

    def load_weights(self, weights: Any) -> Any:
        """Call the model's own loader with the same tensors."""
        return self._model.load_weights(self._digest.watch(weights))


class ChecksumMixin:
    """Mixin for vLLM's transfer engines: `digest` covers the tensors loaded since the last start."""

    model: Any
    digest: Digest

    def start_weight_update(self) -> None:
        self.digest = Digest()
        process_tied_layers_again(self.model)
        super().start_weight_update()  # type: ignore[misc]

    def finish_weight_update(self) -> None:
        super().finish_weight_update()  # type: ignore[misc]
        if torch.accelerator.is_available():  # the weights are in place when the engine confirms them
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Any) -> None:
        model, self.model = self.model, ChecksummedModel(self.model, self.digest)
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model


class NCCLReceiver(ChecksumMixin, NCCLWeightTransferEngine):
    """vLLM's engine for weights over NCCL, with checksums."""


class IPCReceiver(ChecksumMixin, IPCWeightTransferEngine):
    """vLLM's engine for weights on the same GPU, with checksums."""


@dataclass
class StoreInitInfo(WeightTransferInitInfo):
    """There is nothing to set up."""


@dataclass
class StoreUpdateInfo(WeightTransferUpdateInfo):
    """The fields of a `Bucket`."""

    entries: list[Entry]
    data: "np.ndarray"


class StoreEngine(WeightTransferEngine[StoreInitInfo, StoreUpdateInfo]):
    """Receives buckets from Ray's object store."""

    init_info_cls = StoreInitInfo
    update_info_cls = StoreUpdateInfo

    def init_transfer_engine(self, init_info: StoreInitInfo) -> None:
        """There is nothing to connect."""

    def start_weight_update(self) -> None:
        """Prepare the model to load a checkpoint's tensors again, layer by layer."""
        reload.initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: StoreUpdateInfo) -> None:
        """Load a bucket."""
        self.model.load_weights(unpack(Bucket(update_info.entries, update_info.data)))

    def finish_weight_update(self) -> None:
        """Put the processed weights in place."""
        reload.finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """There is nothing to close."""


class StoreReceiver(ChecksumMixin, StoreEngine):
    """`StoreEngine` with checksums."""


class WeightReceiver:
    """Mixed into vLLM's worker class by name (`worker_extension_cls`)."""

    weight_transfer_engine: Any
    model_runner: Any
    reload_weights: Any

    def weights_receipt(self) -> Receipt:
        """The receipt of the update in progress, or of the last one."""
        digest = self.weight_transfer_engine.digest
        return Receipt(digest.hexdigest(), digest.names)

    def load_checkpoint_weights(self, path: str) -> Receipt:
        """Load the weights in a checkpoint's folder into this device's model."""
        digest = Digest()
        process_tied_layers_again(self.model_runner.get_model())
        self.reload_weights(weights_iterator=digest.watch(tensors_of(Path(path))))
        return Receipt(digest.hexdigest(), digest.names)


for name, engine in (("store", StoreReceiver), ("nccl", NCCLReceiver), ("ipc", IPCReceiver)):
    WeightTransferEngineFactory.register_engine(PREFIX + name, engine)
