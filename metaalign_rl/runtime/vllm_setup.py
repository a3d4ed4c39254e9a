"""Prepares a process's environment for vLLM. Call `prepare_vllm` before the first import of vLLM."""

import logging
import os

from metaalign_rl.runtime.cpu_affinity import pin

NO_TRITON = "torch._library.triton"  # warns on a CPU that Triton is not available, although nothing there needs it

ALL_DEVICES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a second process would take 40 s to start
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
CPU_ONLY = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # learners and reward workers share the cores
    # Otherwise vLLM compiles two small sampler functions with g++, which takes 4 to 24 s and saves 0.03 s per call.
    "TORCH_COMPILE_DISABLE": "1",
    "TORCH_LOGS": f"-{NO_TRITON}",
}


def prepare_vllm() -> bool:
    """Set vLLM's environment variables for this machine. Variables that are set already keep their values.

    Returns:
        Whether vLLM runs on the CPU.
    """
    import torch

    pin()
    on_cpu = not torch.cuda.is_available()
    for name, value in (ALL_DEVICES | (CPU_ONLY if on_cpu else {})).items():
        os.environ.setdefault(name, value)
    if on_cpu:
        logging.getLogger(NO_TRITON).setLevel(logging.ERROR)  # torch has read TORCH_LOGS when it was imported
    return on_cpu
