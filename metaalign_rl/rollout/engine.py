"""A vLLM engine that samples answers and takes new weights while it runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
        number: int = 0,
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
            threads: of a CPU; None leaves torch's own choice. Where other processes compute on the same
                cores, more than one is several times slower, since idle threads spin, unless the process
                starts with OMP_WAIT_POLICY=PASSIVE.
            number: of this engine among the run's; its samples carry it.

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
        # On a CPU a chunked prompt with a seed crashes vLLM 0.29 ("CPU Generator does not use offset").
        for_device = {
            "kv_cache_memory_bytes": int(kv_cache_gib * GIB),
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCH_TOKENS, max_tokens),
        } if on_cpu else {"gpu_memory_utilization": gpu_memory_utilization}  # fmt: skip
        self._engine = start(
            model=model_path,
            dtype=dtype,
            seed=seed,
            max_model_len=max_tokens,
            max_num_seqs=max_sequences,
            tensor_parallel_size=tensor_parallel,
            **for_device,
        )
        self._tokenizer: Any = self._engine.get_tokenizer()
        self._max_tokens = max_tokens
        self._version = 0
        self._number = number

    def ready(self) -> int:
        """The version of the weights that it holds; answers once the model is loaded."""
        return self._version

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        """Draw one answer a request; yields, in the order they end, those that a step of the engine finished.

        A Ray streaming generator: lists, because an object for each sample would cost about 1 ms each. The
        same calls in the same order on a fresh engine draw the same answers. A request's own `seed` makes its
        answer independent of what is drawn beside it, up to the arithmetic's last bits; on a CPU seeds cost
        10 to 40 % more time (256 requests, vocabulary of 1,200).

        Raises:
            UserError: a prompt is empty, or leaves less than `max_new_tokens` of the engine's `max_tokens`.
        """
        from vllm.inputs.engine import tokens_input

        for request in requests:
            self._check_length(request, sampling)
        waiting = {str(position): request for position, request in enumerate(requests)}
        try:
            for key, request in waiting.items():
                prompt = tokens_input(list(request.prompt_ids))
                self._engine.add_request(key, prompt, sampling_params(sampling, request.seed))
            while waiting:
                done = cast("list[RequestOutput]", self._engine.step())
                if done:
                    yield self._samples([waiting.pop(output.request_id) for output in done], done)
        finally:  # the caller may stop listening
            self._engine.abort_request(list(waiting))

    def abort(self) -> None:
        """Interim."""

    def load_weights(self, update: WeightUpdate) -> tuple[int, str]:
        """Replace the model's weights; answers with the version and the checksum of what the loader took.

        Raises:
            StaleEngine: the update lacks tensors of the model, which would keep their old values unnoticed,
                or one device's loader took something else than another's.
        """
        assert not self._engine.has_unfinished_requests(), "an answer must be drawn from one set of weights"
        missing = self._expected - {entry.name for entry in update.entries}
        if missing:
            raise StaleEngine(
                f"weight update {update.version} lacks {len(missing)} of the model's {len(self._expected)} "
                f"tensors, such as {min(missing)!r}: the engine would keep their old values"
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
                f"request {request.index}: a prompt of {length} tokens and "
                f"max_new_tokens={sampling.max_new_tokens} do not fit the engine's "
                f"max_tokens={self._max_tokens}: shorten the prompt (1 token at least) or change these"
            )

    def _samples(self, requests: list[Request], outputs: list["RequestOutput"]) -> list[Sample]:
        from vllm.logprobs import FlatLogprobs

        texts = self._tokenizer.batch_decode(
            [output.outputs[0].token_ids for output in outputs], skip_special_tokens=True
        )
        samples = []
        for request, output, text in zip(requests, outputs, texts, strict=True):
            answer = output.outputs[0]
            assert answer.finish_reason in ("stop", "length"), answer.finish_reason
            assert isinstance(answer.logprobs, FlatLogprobs)
            assert len(answer.logprobs.logprobs) == len(answer.token_ids)
            samples.append(
                Sample(
                    index=request.index,
                    prompt_ids=request.prompt_ids,
                    response_ids=list(answer.token_ids),
                    logprobs=answer.logprobs.logprobs,
                    text=text,
                    finished=answer.finish_reason == "stop",
                    weight_version=self._version,
                    first_version=self._version,
                    engine=self._number,
                )
            )
        return samples


def start(**options: Any) -> "LLMEngine":
    """A vLLM engine with the settings that do not depend on the config; `prepare` comes first."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(
            load_format="safetensors",
            use_tqdm_on_load=False,
            logprobs_mode="raw_logprobs",
            disable_log_stats=True,
            worker_extension_cls="metaalign_rl.rollout.receiver.WeightReceiver",
            **options,
        )
    )


def sampling_params(sampling: Sampling, seed: int | None) -> "SamplingParams":
    """vLLM's parameters: one log-probability a token, no text, told once, when the answer has ended."""
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
