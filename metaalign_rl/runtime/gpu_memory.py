"""Give GPU memory back to processes that share the GPU. Imports no heavy packages."""

import gc
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def frees_gpu_memory(work: Callable[P, T]) -> Callable[P, T]:
    """Decorate work after which the process keeps only the GPU memory that it still uses.

    torch caches freed memory for itself. An engine on the same GPU could not map it when it wakes up. Without a GPU
    this does nothing.
    """

    @wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return work(*args, **kwargs)
        finally:
            free_cached_memory()

    return run


def free_cached_memory() -> None:
    """Collect garbage and return cached GPU memory to the driver."""
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
