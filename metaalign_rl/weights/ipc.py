"""Weights on shared GPUs: vLLM's CUDA IPC. An engine reads its learner's bucket in place. Not run on a GPU yet."""

import math
from typing import Any

from metaalign_rl.runtime.vllm_setup import prepare_vllm
from metaalign_rl.weights.engine_client import EnginesClient
from metaalign_rl.weights.sync_plan import SyncPlan
from metaalign_rl.weights.weight_stream import WeightStream


def ipc_trainer(plan: SyncPlan, rank: int, client: EnginesClient, source: WeightStream) -> Any:
    """vLLM's own sender. Each rank shares its bucket with the engine on its GPU; rank 0 makes the calls for all."""
    prepare_vllm()  # the first import of vLLM in this process
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    return WeightTransferTrainerFactory.trainer_init(init_info(plan, rank, source), client=client, source=source)


def init_info(plan: SyncPlan, rank: int, source: WeightStream) -> Any:
    """The size of a bucket. vLLM refuses tensors that are larger than it, so the largest tensor must fit."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    largest = max(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in source.metadata())
    return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=max(plan.bucket_bytes, largest), rank=rank)
