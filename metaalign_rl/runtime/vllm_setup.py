"""The one place that knows how vLLM's process must be set up before vLLM is imported."""

import os

from metaalign_rl.runtime.cpu_affinity import pin

EVERYWHERE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a second process would take 40 s to start
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
CPU_ONLY = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # learners and reward workers share the cores
    # Else vLLM compiles two small sampler functions with g++: 4 to 24 s, to save 0.03 s a call.
    "TORCH_COMPILE_DISABLE": "1",
}


def prepare_vllm() -> bool:
    """Set the environment for vLLM on this machine's device; whether that device is the CPU.

    Must come before the process's first import of vLLM. What the user has set stays.
    """
    import torch

    pin()
    on_cpu = not torch.cuda.is_available()
    for name, value in (EVERYWHERE | (CPU_ONLY if on_cpu else {})).items():
        os.environ.setdefault(name, value)
    return on_cpu
