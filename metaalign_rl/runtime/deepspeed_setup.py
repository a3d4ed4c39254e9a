"""What DeepSpeed wants set before it is imported, on a machine with CUDA and on one without."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from metaalign_rl.runtime.cpu_affinity import pin

TIMEOUT = timedelta(hours=1)  # a rank may wait while another saves a large model


def prepare(rank: int, world_size: int, rendezvous: str) -> torch.device:
    """Join the learners' process group and make DeepSpeed ready to use; the device to work on.

    Each rank is a process of its own that sees one GPU (as Ray arranges it) or none.

    Args:
        rendezvous: torch's `init_method`: "file:///..." of a file that does not exist yet, for ranks on one
            node (torch's own TCP store listens on all interfaces), or "tcp://host:port".
    """
    pin()
    cuda = torch.cuda.is_available()
    # DeepSpeed looks for MPI where these are not set. Accelerate wants an address, although the group that it would
    # make there exists already.
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
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
    _prepare_libraries(cuda)
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


def _prepare_libraries(cuda: bool) -> None:
    import deepspeed
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it reports a critic's new head as a table of problems
    deepspeed.utils.logger.setLevel("WARNING")
    # On a CPU DeepSpeed compiles this for a minute at first use, and works without it. CUDA never
    # asks for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()
        if not cuda:
            _wait_for_every_gather(deepspeed.comm.comm.cdb)


def _wait_for_every_gather(backend: Any) -> None:
    """Make DeepSpeed's gathering of sharded weights right over gloo.

    It starts one gather a weight and waits for the last alone. CUDA runs them in order; gloo does not, so
    that under ZeRO-3 a late gather would overwrite weights that were loaded meanwhile.
    """
    gather = backend.all_gather_into_tensor

    def finished(*args: Any, **kwargs: Any) -> Any:
        work = gather(*args, **kwargs)
        if work is not None:
            work.wait()
        return work

    backend.all_gather_into_tensor = finished
