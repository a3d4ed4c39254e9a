"""Weights between GPUs: vLLM's NCCL broadcast from learner rank 0 to all engines' devices. Not run on a GPU yet."""

import socket
from typing import Any

import ray

from metaalign_rl.runtime.vllm_setup import prepare_vllm
from metaalign_rl.weights.engine_client import EnginesClient
from metaalign_rl.weights.sync_plan import SyncPlan
from metaalign_rl.weights.weight_stream import WeightStream


def nccl_trainer(plan: SyncPlan, rank: int, client: EnginesClient, source: WeightStream) -> Any:
    """vLLM's own sender, connected: the sender and all engines of the plan are one NCCL group."""
    prepare_vllm()  # the first import of vLLM in this process
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    return WeightTransferTrainerFactory.trainer_init(init_info(plan, rank), client=client, source=source)


def init_info(plan: SyncPlan, rank: int) -> Any:
    """The group's address and size, and the size of a bucket. Only rank 0 uses them."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(
        master_address=ray.util.get_node_ip_address(),
        master_port=_free_port(),
        world_size=1 + len(plan.engines) * plan.devices,
        packed_buffer_size_bytes=plan.bucket_bytes,
        rank=rank,
    )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
        return port
