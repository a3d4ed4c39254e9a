"""vLLM's engine arguments."""

from typing import TYPE_CHECKING, Any

from metaalign_rl.core.units import GIB
from metaalign_rl.weights.sync_plan import Backend

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

CPU_BATCH_TOKENS = 8192  # prompt tokens per engine step; enough for 256 short prompts


def cpu_options(kv_cache_gib: float, max_tokens: int, batch_tokens: int | None) -> dict[str, Any]:
    """Arguments of `start` for a CPU."""
    return {
        "kv_cache_memory_bytes": int(kv_cache_gib * GIB),
        "enforce_eager": True,
        "enable_chunked_prefill": False,  # a chunked prompt with a seed crashes vLLM 0.32: "does not use offset"
        "max_num_batched_tokens": max(batch_tokens or CPU_BATCH_TOKENS, max_tokens),
    }


def gpu_options(memory_utilization: float, sleeps: bool, batch_tokens: int | None) -> dict[str, Any]:
    """Arguments of `start` for a GPU."""
    options = {"gpu_memory_utilization": memory_utilization, "enable_sleep_mode": sleeps}
    return options | {"max_num_batched_tokens": batch_tokens}


def start(*, tensor_parallel: int, backend: Backend, temperature: float = 1.0, **options: Any) -> "LLMEngine":
    """A vLLM engine. Call `prepare_vllm` first.

    Args:
        temperature: of the log-probabilities. vLLM knows those of temperature 1, and those of what is sampled; the
            latter also see top-p and the minimum of tokens.
    """
    from vllm import EngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(
            load_format="safetensors",
            use_tqdm_on_load=False,
            logprobs_mode="raw_logprobs" if temperature == 1 else "processed_logprobs",
            disable_log_stats=True,
            async_scheduling=False,  # weights may change between two steps, so no step may be in progress then
            tensor_parallel_size=tensor_parallel,
            # Inside an actor vLLM would choose Ray. An engine's devices are on one node, so processes are enough.
            distributed_executor_backend="uni" if tensor_parallel == 1 else "mp",
            worker_extension_cls="metaalign_rl.weights.vllm_worker.WeightReceiver",
            weight_transfer_config=WeightTransferConfig(backend=f"checked_{backend}"),
            **options,
        ),
        usage_context=UsageContext.LLM_CLASS,  # vLLM's defaults for many prompts at a time, by the kind of device
    )
