"""What vLLM is started with, and the models that it cannot take."""

from typing import TYPE_CHECKING, Any

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.units import GIB
from metaalign_rl.weights.sync_plan import Backend

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

CPU_BATCH_TOKENS = 8192  # prompt tokens of one step: all of 256 short prompts at once


def cpu_options(kv_cache_gib: float, max_tokens: int) -> dict[str, Any]:
    """What `start` is given beside the rest on a CPU."""
    return {
        "kv_cache_memory_bytes": int(kv_cache_gib * GIB),
        "enforce_eager": True,
        "enable_chunked_prefill": False,  # such a prompt with a seed crashes vLLM 0.29: "does not use offset"
        "max_num_batched_tokens": max(CPU_BATCH_TOKENS, max_tokens),
    }


def gpu_options(memory_utilization: float, sleeps: bool) -> dict[str, Any]:
    """The same on a GPU."""
    return {"gpu_memory_utilization": memory_utilization, "enable_sleep_mode": sleeps}


def start(*, tensor_parallel: int, backend: Backend, **options: Any) -> "LLMEngine":
    """A vLLM engine with the settings that do not depend on the config; `prepare` comes first."""
    from vllm import EngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(
            load_format="safetensors",
            use_tqdm_on_load=False,
            logprobs_mode="raw_logprobs",
            disable_log_stats=True,
            async_scheduling=False,  # between two steps nothing must be under way, since weights may change there
            tensor_parallel_size=tensor_parallel,
            # Not Ray's, which vLLM would choose by itself inside an actor: an engine's devices are on one node.
            distributed_executor_backend="uni" if tensor_parallel == 1 else "mp",
            worker_extension_cls="metaalign_rl.weights.vllm_worker.WeightReceiver",
            weight_transfer_config=WeightTransferConfig(backend=f"checked_{backend}"),
            **options,
        )
    )


def refuse_tied_embeddings(model_path: str) -> None:
    """Refuse a model whose output layer is its embedding: on a CPU, vLLM 0.29 would keep the old one.

    Raises:
        UserError: says how to save the model untied.
    """
    from transformers import AutoConfig

    if AutoConfig.from_pretrained(model_path).get_text_config().tie_word_embeddings:
        raise UserError(
            f"{model_path}: the model's input and output embeddings are tied, and on a CPU vLLM silently "
            "keeps the old output embedding when it takes new weights. Save the model untied: "
            "tie_word_embeddings=false in its config and lm_head.weight among its tensors"
        )
