"""A vLLM engine that samples answers and takes new weights while it runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from metaalign_rl.errors import UserError
from metaalign_rl.rollout.platform import prepare
from metaalign_rl.rollout.types import Request, Sample, Sampling
from metaalign_rl.weights import StaleEngine, WeightUpdate

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

GIB = 2**30
CPU_BATCH_TOKENS = 8192  # prompt tokens of one step: all of 256 short prompts at once


class RolloutEngine:
    """One vLLM engine in its own process; the caller makes it a Ray actor (`ray.remote(RolloutEngine)`).

    It speaks only to the caller: no network, no files but the model's folder, which must hold safetensors.
    """

    def __init__(
        self,
        model_path: str,
        *,
        max_tokens: int,
        max_sequences: int = 256,
        dtype: str = "float32",
        seed: int = 0,
        kv_cache_gib: float = 1.0,
        gpu_memory_utilization: float = 0.5,
        tensor_parallel: int = 1,
        threads: int | None = None,
    ) -> None:
        """Load the model and its tokenizer. Weight version 0 is what the folder holds.

        Args:
            max_tokens: longest prompt and answer together.
            max_sequences: answers drawn side by side; more requests wait their turn.
            dtype: of weights and arithmetic, such as "float32" or "bfloat16".
            seed: of everything drawn without a request's own seed.
            kv_cache_gib: memory for keys and values on a CPU.
            gpu_memory_utilization: share of the GPU's memory for weights, keys and values.
            tensor_parallel: devices that share the model.
            threads: of a CPU; None leaves torch's own choice. Where other processes compute on the same cores, 1 is
                several times faster than more: idle threads spin.

        Raises:
            UserError: no such model folder, no safetensors in it, or tied embeddings on a CPU.
        """
        self._expected = tensor_names(Path(model_path))
        on_cpu = prepare()
        if on_cpu:
            refuse_tied_embeddings(model_path)
        if on_cpu and threads is not None:
            import torch

            torch.set_num_threads(threads)  # vLLM forbids it later
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        # On a CPU a chunked prompt with a request seed crashes vLLM 0.29 ("CPU Generator does not use offset").
        for_device = {
            "kv_cache_memory_bytes": int(kv_cache_gib * GIB),
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCH_TOKENS, max_tokens),
        } if on_cpu else {"gpu_memory_utilization": gpu_memory_utilization}  # fmt: skip
        self._engine: LLMEngine = LLMEngine.from_engine_args(
            EngineArgs(
                model=model_path,
                load_format="safetensors",
                use_tqdm_on_load=False,
                dtype=dtype,
                seed=seed,
                max_model_len=max_tokens,
                max_num_seqs=max_sequences,
                tensor_parallel_size=tensor_parallel,
                logprobs_mode="raw_logprobs",
                disable_log_stats=True,
                worker_extension_cls="metaalign_rl.rollout.receiver.WeightReceiver",
                **for_device,
            )
        )
        self._tokenizer = self._engine.get_tokenizer()
        self._max_tokens = max_tokens
        self._version = 0

    def ready(self) -> int:
        """The version of the weights that it holds; answers once the model is loaded."""
        return self._version

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        """Draw one answer a request; yields, in the order they end, those that a step of the engine finished.

        A Ray streaming generator: lists, because an object for each sample would cost about 1 ms each. The same calls
        in the same order on a fresh engine draw the same answers. A request's own `seed` makes its answer independent
        of what is drawn beside it, up to the arithmetic's last bits; it costs about a third more time on a CPU.

        Raises:
            UserError: a prompt is empty, or leaves less than `max_new_tokens` of the engine's `max_tokens`.
        """
        for request in requests:
            self._check_length(request, sampling)
        waiting = {str(position): request for position, request in enumerate(requests)}
        try:
            for key, request in waiting.items():
                prompt = {"type": "token", "prompt_token_ids": list(request.prompt_ids)}
                self._engine.add_request(key, prompt, sampling_params(sampling, request.seed))
            while waiting:
                done = self._engine.step()
                if done:
                    yield self._samples([(waiting.pop(output.request_id), output) for output in done])
        finally:  # the caller may stop listening
            self._engine.abort_request(list(waiting))

    def load_weights(self, update: WeightUpdate) -> tuple[int, str]:
        """Replace the model's weights; answers with the version and the checksum of what the loader took.

        Raises:
            StaleEngine: the update lacks tensors of the model, which would keep their old values unnoticed, or a
                device's loader took something else than the others'.
        """
        assert not self._engine.has_unfinished_requests(), "an answer must be drawn from one set of weights"
        missing = self._expected - {entry.name for entry in update.entries}
        if missing:
            raise StaleEngine(
                f"weight update {update.version} lacks {len(missing)} of the model's {len(self._expected)} tensors, "
                f"such as {min(missing)!r}: the engine would keep their old values"
            )
        taken = self._engine.collective_rpc("receive_weights", args=(update,))
        if len(set(taken)) != 1:
            raise StaleEngine(f"weight update {update.version}: the engine's devices took different weights: {taken}")
        dropped = self._engine.reset_prefix_cache()
        assert dropped, "keys and values of the old weights are still in use"
        self._version = update.version
        return self._version, taken[0]

    def _check_length(self, request: Request, sampling: Sampling) -> None:
        length = len(request.prompt_ids)
        if not 0 < length <= self._max_tokens - sampling.max_new_tokens:
            raise UserError(
                f"request {request.index}: a prompt of {length} tokens and max_new_tokens={sampling.max_new_tokens} do "
                f"not fit the engine's max_tokens={self._max_tokens}: shorten the prompt (1 token at least), or change "
                "one of the two"
            )

    def _samples(self, done: list[tuple[Request, "RequestOutput"]]) -> list[Sample]:
        completions = [output.outputs[0] for _, output in done]
        responses = [list(completion.token_ids) for completion in completions]
        texts = self._tokenizer.batch_decode(responses, skip_special_tokens=True)
        samples = []
        for (request, _), completion, response, text in zip(done, completions, responses, texts, strict=True):
            assert completion.finish_reason in ("stop", "length"), completion.finish_reason
            logprobs = list(completion.logprobs.logprobs)
            assert len(logprobs) == len(response)
            finished = completion.finish_reason == "stop"
            samples.append(
                Sample(request.index, request.prompt_ids, response, logprobs, text, finished, self._version)
            )
        return samples


def sampling_params(sampling: Sampling, seed: int | None) -> "SamplingParams":
    """vLLM's parameters: the drawn token's log-probability and nothing else, told once an answer has ended."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def tensor_names(model_path: Path) -> set[str]:
    """The names of the tensors in a model folder.

    Raises:
        UserError: there is no such folder, or it holds no safetensors.
    """
    from safetensors import safe_open

    if not model_path.is_dir():
        raise UserError(f"{model_path}: no such model folder; a rollout engine loads from disk only")
    names: set[str] = set()
    for file in sorted(model_path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    if not names:
        raise UserError(f"{model_path}: holds no *.safetensors; save the model with save_pretrained()")
    return names


def refuse_tied_embeddings(model_path: str) -> None:
    """Refuse a model whose output layer is its embedding: on a CPU, vLLM 0.29 would keep the old output layer.

    Raises:
        UserError: says how to save the model untied.
    """
    from transformers import AutoConfig

    if AutoConfig.from_pretrained(model_path).get_text_config().tie_word_embeddings:
        raise UserError(
            f"{model_path}: the model's input and output embeddings are tied, and on a CPU vLLM silently keeps the old "
            "output embedding when it takes new weights. Save the model untied: tie_word_embeddings=false in its "
            "config and lm_head.weight among its tensors"
        )
