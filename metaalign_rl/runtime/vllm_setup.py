"""Prepares a process's environment for vLLM. Call `prepare_vllm` before the first import of vLLM."""

import os

from metaalign_rl.runtime.cpu_affinity import pin

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
    return on_cpu
