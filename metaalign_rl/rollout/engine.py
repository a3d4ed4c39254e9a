"""A vLLM engine that generates responses and accepts new weights while it runs."""

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray

from metaalign_rl.core.checkpoints import trained_tensor_names
from metaalign_rl.core.dataflow import Request, Sample, Sampling
from metaalign_rl.rollout.engine_args import cpu_options, gpu_options, start
from metaalign_rl.rollout.vllm_io import Finished, check_length, sampling_params, to_samples
from metaalign_rl.runtime.vllm_setup import prepare_vllm
from metaalign_rl.weights import StaleEngine
from metaalign_rl.weights.sync_plan import Backend

if TYPE_CHECKING:
    from vllm import RequestOutput

    from metaalign_rl.weights.vllm_worker import Receipt

HEARTBEAT = 2.0  # seconds
THREADS = {"concurrency_groups": {"control": 1}}  # options of the actor; `generate` runs in the default group
KEPT, DISCARDED = 1, 2  # vLLM's levels of sleep: whether the weights move to main memory or are dropped
T = TypeVar("T")


class RolloutEngine:
    """One vLLM engine in its own process. Make it a Ray actor with `ray.remote(**THREADS)(RolloutEngine)`.

    It communicates only with its caller and with the learners that send weights. It reads only model folders in
    safetensors format.

    Ray calls the methods in several threads. All of vLLM's work is done in one thread of the engine's own, one call
    after the other: CUDA's current stream and the CPU's thread pool belong to a thread.
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
        batch_tokens: int | None = None,
        tensor_parallel: int = 1,
        sleeps: bool = False,
        backend: Backend = "store",
        number: int = 0,
        temperature: float = 1.0,
    ) -> None:
        """Load the model and its tokenizer. The folder's weights are version 0.

        Args:
            max_tokens: longest prompt plus response.
            max_sequences: responses generated at the same time; more requests wait.
            dtype: type of weights and arithmetic, such as "float32" or "bfloat16".
            seed: seed of all sampling without a request's own seed.
            kv_cache_gib: GiB for keys and values on a CPU.
            gpu_memory_utilization: share of the GPU's memory for weights, keys and values.
            batch_tokens: prompt tokens that one engine step reads; None: vLLM's default for the kind of device.
            tensor_parallel: devices of one node that share the model; on a CPU, processes.
            sleeps: whether `sleep` frees the GPU's memory. Enabling this costs some memory from the start.
            backend: how new weights arrive.
            number: this engine's index, recorded in each sample.
            temperature: of the samples' log-probabilities. If it is not 1, these are only right for samples that are
                drawn at this temperature, without top-p and a minimum of tokens.

        Raises:
            UserError: there is no such model folder, or it has no safetensors.
        """
        self._expected = trained_tensor_names(Path(model_path))
        on_cpu = prepare_vllm()
        own = cpu_options(kv_cache_gib, max_tokens, batch_tokens)
        if not on_cpu:
            own = gpu_options(gpu_memory_utilization, sleeps, batch_tokens)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._engine = self._do(
            start,
            model=model_path,
            dtype=dtype,
            seed=seed,
            max_model_len=max_tokens,
            max_num_seqs=max_sequences,
            tensor_parallel=tensor_parallel,
            backend=backend,
            temperature=temperature,
            **own,
        )
        self._tokenizer: Any = self._engine.get_tokenizer()
        self._max_tokens, self._number = max_tokens, number
        self._sleeps, self._asleep = sleeps and not on_cpu, list[str]()
        self._begin()
        gc.freeze()  # these objects stay, so the garbage collector does not have to scan them

    def _begin(self) -> None:
        """The state of an engine that has just loaded its model."""
        self._version = 0
        self._first_versions: dict[str, int] = {}  # requests whose first token is older than the current weights
        self._waiting: dict[str, Request] = {}  # requests in progress; only the engine's thread changes it
        self._running = Event()  # cleared while weights change
        self._running.set()
        self._is_updating = False
        self._has_weights = True  # not after a sleep that discarded them

    @ray.method(concurrency_group="control")
    def ready(self) -> int:
        """The version of its weights. Returns when the model is loaded."""
        return self._version

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        """Generate one response per request. Yields the samples that each engine step finished.

        This is a Ray streaming generator. It yields lists, because one Ray object per sample would cost about 1 ms. If
        nothing finishes for `HEARTBEAT` seconds, it yields an empty list as a heartbeat. New weights may arrive between
        two engine steps: responses in progress continue with them, and their keys and values are computed again.

        The same calls in the same order on a new engine give the same responses. A request with its own `seed` gives
        the same response whatever else is generated, except for rounding; on a CPU, seeds cost time.

        Raises:
            UserError: a prompt is empty, or leaves less than `max_new_tokens` of the engine's `max_tokens`.
        """
        for request in requests:
            check_length(request, sampling, self._max_tokens)
        try:
            self._do(self._add, requests, sampling)
            last_yield = time.monotonic()
            while self._waiting:
                # A paused engine has no step to run; look again for a heartbeat.
                finished = self._do(self._step) if self._running.wait(HEARTBEAT) else []
                if finished or time.monotonic() - last_yield >= HEARTBEAT:
                    yield to_samples(finished, self._number, self._tokenizer) if finished else []
                    last_yield = time.monotonic()
        finally:  # also if the caller stops iterating
            self._do(self._abort)

    # The methods below run in the actor's control thread, also while `generate` runs.

    @ray.method(concurrency_group="control")
    def abort(self) -> None:
        """Stop all requests in progress; the caller no longer needs them."""
        self._do(self._abort)

    @ray.method(concurrency_group="control")
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to a learner, with the backend's transfer engine."""
        self._do(self._on_devices, "init_weight_transfer_engine", init_info)

    @ray.method(concurrency_group="control")
    def start_weight_update(self) -> None:
        """Pause generation after the engine step in progress, until the update is finished."""
        self._running.clear()
        self._do(self._start_update)

    @ray.method(concurrency_group="control")
    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket."""
        try:
            self._do(self._on_devices, "update_weights", update_info)
        except BaseException:
            self._is_updating = False  # vLLM's workers have ended the update too
            raise

    @ray.method(concurrency_group="control")
    def finish_weight_update(self, version: int) -> tuple[int, str]:
        """Resume with the new weights. Returns the version, and the checksum of the loaded tensors.

        Raises:
            StaleEngine: the update lacks tensors of the model, or the engine's devices loaded different tensors. The
                engine stays paused.
        """
        answer = self._do(self._finish_update, version)
        self._running.set()
        return answer

    @ray.method(concurrency_group="control")
    def load_checkpoint(self, path: str, version: int) -> tuple[int, str]:
        """Load the weights in a checkpoint's folder. Returns and raises as `finish_weight_update`."""
        return self._do(self._load_checkpoint, path, version)

    @ray.method(concurrency_group="control")
    def sleep(self, keep_weights: bool = False) -> None:
        """Free the GPU's memory: keys and values are dropped, and the weights too, since an update follows.

        The engine wakes up automatically: its weights when an update starts, the rest when it has to generate. On a CPU
        this does nothing.

        Args:
            keep_weights: move the weights to main memory instead. Only then may the engine generate without an update.
        """
        self._do(self._sleep, KEPT if keep_weights else DISCARDED)

    @ray.method(concurrency_group="control")
    def wake_up(self) -> None:
        """Allocate the memory again."""
        self._do(self._wake, ["weights", "kv_cache"])

    # The methods below run in the engine's own thread.

    def _do(self, work: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """The result of `work`, done in the engine's own thread after what was asked before."""
        return self._thread.submit(work, *arguments, **options).result()

    def _on_devices(self, method: str, *arguments: Any) -> list[Any]:
        return self._engine.collective_rpc(method, args=arguments)

    def _abort(self) -> None:
        self._engine.abort_request(list(self._waiting))
        self._waiting.clear()
        self._first_versions.clear()

    def _start_update(self) -> None:
        self._wake(["weights"])
        if self._is_updating:  # the sender of the last update died
            self._on_devices("finish_weight_update")
        self._on_devices("start_weight_update")
        self._is_updating = True

    def _finish_update(self, version: int) -> tuple[int, str]:
        receipts = self._on_devices("weights_receipt")
        self._on_devices("finish_weight_update")
        self._is_updating = False
        return self._adopt(version, receipts)

    def _load_checkpoint(self, path: str, version: int) -> tuple[int, str]:
        self._wake(["weights"])
        return self._adopt(version, self._on_devices("load_checkpoint_weights", path))

    def _sleep(self, level: int) -> None:
        assert not self._engine.has_unfinished_requests(), "requests are in progress"
        if self._sleeps and not self._asleep:
            self._engine.sleep(level=level)
            self._asleep, self._has_weights = ["weights", "kv_cache"], level == KEPT

    def _wake(self, parts: list[str]) -> None:
        if sleeping := [part for part in self._asleep if part in parts]:
            self._engine.wake_up(sleeping)
            self._asleep = [part for part in self._asleep if part not in parts]

    def _adopt(self, version: int, receipts: "list[Receipt]") -> tuple[int, str]:
        checksums = [receipt.checksum for receipt in receipts]
        if len(set(checksums)) != 1:
            raise StaleEngine(f"weight update {version}: the engine's devices loaded different weights: {checksums}")
        missing = self._expected - receipts[0].names
        if missing:
            raise StaleEngine(
                f"weight update {version} lacks {len(missing)} of the model's {len(self._expected)} "
                f"tensors, such as {min(missing)!r}: the engine would keep their old values"
            )
        # Drop keys and values of the old weights; requests in progress compute theirs again.
        self._engine.reset_prefix_cache(reset_running_requests=True)
        for state in self._engine.output_processor.request_states.values():
            if not state.is_prefilling:  # it has tokens
                self._first_versions.setdefault(state.external_req_id, self._version)
        self._version, self._has_weights = version, True
        return version, checksums[0]

    def _add(self, requests: list[Request], sampling: Sampling) -> None:
        from vllm.inputs.engine import tokens_input

        if not self._has_weights:
            raise StaleEngine("the engine's weights were discarded when it went to sleep, and no update followed")
        self._wake(["weights", "kv_cache"])
        self._waiting = {str(position): request for position, request in enumerate(requests)}
        for key, request in self._waiting.items():
            prompt = tokens_input(list(request.prompt_ids))
            self._engine.add_request(key, prompt, sampling_params(sampling, request.seed))

    def _step(self) -> list[Finished]:
        """Run one engine step. Returns what it finished."""
        if not self._running.is_set():  # paused just now
            return []
        outputs = cast("list[RequestOutput]", self._engine.step())
        return [self._finished(output) for output in outputs]

    def _finished(self, output: "RequestOutput") -> Finished:
        key, last = output.request_id, self._version
        return Finished(self._waiting.pop(key), output, self._first_versions.pop(key, last), last)
