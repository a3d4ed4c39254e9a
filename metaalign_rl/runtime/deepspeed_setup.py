"""Prepares a process for DeepSpeed: process group, environment and libraries, with or without CUDA."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from metaalign_rl.runtime.cpu_affinity import pin

COLLECTIVE_TIMEOUT = timedelta(hours=1)  # a rank may wait while another one saves a large model


def prepare(rank: int, world_size: int, rendezvous: str) -> torch.device:
    """Join the process group of all ranks, import DeepSpeed and return the device to use.

    Each rank is a separate process that sees one GPU (as Ray arranges it) or none.

    Args:
        rendezvous: torch's `init_method`. `file:///...`, a file that does not exist yet, for ranks that share storage;
            `tcp://host:port` otherwise, but torch's TCP store listens on all interfaces.
    """
    pin()
    cuda = torch.cuda.is_available()
    # If RANK and the others are not set, DeepSpeed looks for MPI. Accelerate requires MASTER_ADDR, although the process
    # group exists already.
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    _prepare_libraries(cuda)
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


def _prepare_libraries(cuda: bool) -> None:
    import deepspeed
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # otherwise it prints a table of problems for a critic's new head
    deepspeed.utils.logger.setLevel("WARNING")
    # On a CPU DeepSpeed would compile this optional extension for a minute at its first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()
        if not cuda:
            _wait_for_each_gather(deepspeed.comm.comm.cdb)


def _wait_for_each_gather(backend: Any) -> None:
    """Make DeepSpeed's gathering of sharded weights correct under gloo.

    DeepSpeed starts one gather per weight and waits only for the last one. CUDA runs them in order, gloo does not.
    Under ZeRO-3 a late gather would then overwrite weights that were loaded in the meantime.
    """
    gather = backend.all_gather_into_tensor

    def gather_and_wait(*args: Any, **kwargs: Any) -> Any:
        work = gather(*args, **kwargs)
        if work is not None:
            work.wait()
        return work

    backend.all_gather_into_tensor = gather_and_wait
