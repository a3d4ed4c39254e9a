"""What DeepSpeed wants set before it is imported, on a machine with CUDA and on one without."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(hours=1)  # a rank may wait while another saves a large model


def prepare(rank: int, world_size: int, rendezvous: str) -> torch.device:
    """Join the learners' process group and make DeepSpeed ready to use; the device to work on.

    Each rank is a process of its own that sees one GPU (as Ray arranges it) or none.

    Args:
        rendezvous: torch's `init_method`: "file:///..." of a file that does not exist yet, for ranks on one node
            (torch's own TCP store listens on all interfaces), or "tcp://host:port".
    """
    cuda = torch.cuda.is_available()
    # DeepSpeed looks for MPI where these are not set.
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
        )
    _import_libraries()
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


def _import_libraries() -> None:
    import deepspeed
    from transformers.utils import logging

    deepspeed.utils.logger.setLevel("WARNING")
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it reports a critic's new head as a table of problems
    # On a CPU DeepSpeed compiles this for a minute at first use, and works without it. CUDA never asks for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
