"""On shared GPUs: vLLM's CUDA IPC, in which an engine reads its learner's bucket in place. Not run on a GPU yet."""

import math
from typing import Any

from metaalign_rl.runtime.vllm_setup import prepare_vllm
from metaalign_rl.weights.engine_client import EnginesClient
from metaalign_rl.weights.sync_plan import SyncPlan
from metaalign_rl.weights.weight_stream import WeightStream


def ipc_trainer(route: SyncPlan, rank: int, client: EnginesClient, source: WeightStream) -> Any:
    """vLLM's own engine. Each rank lends its bucket to the engine on its GPU; rank 0 calls the engines for all."""
    prepare_vllm()  # the first import of vLLM in this process
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    return WeightTransferTrainerFactory.trainer_init(init_info(route, rank, source), client=client, source=source)


def init_info(route: SyncPlan, rank: int, source: WeightStream) -> Any:
    """How large a bucket is: vLLM refuses a tensor that is larger, so that the largest one must fit."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    largest = max(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in source.metadata())
    return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=max(route.bucket_bytes, largest), rank=rank)
