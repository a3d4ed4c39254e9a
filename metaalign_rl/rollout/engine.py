"""A vLLM engine that samples answers and takes new weights while it runs."""

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, cast

import ray

from metaalign_rl.core.checkpoints import tensor_names
from metaalign_rl.core.dataflow import Request, Sample, Sampling
from metaalign_rl.rollout.engine_args import cpu_options, gpu_options, refuse_tied_embeddings, start
from metaalign_rl.rollout.vllm_io import check_length, sampling_params, to_samples
from metaalign_rl.runtime.vllm_setup import prepare_vllm
from metaalign_rl.weights import StaleEngine
from metaalign_rl.weights.sync_plan import Backend

if TYPE_CHECKING:
    from vllm import RequestOutput

    from metaalign_rl.weights.vllm_worker import Receipt

HEARTBEAT = 2.0  # seconds
THREADS = {"concurrency_groups": {"control": 1}}  # of the actor: answers are drawn in another one


class RolloutEngine:
    """One vLLM engine in its own process; the caller makes it a Ray actor: `ray.remote(**THREADS)(RolloutEngine)`.

    It speaks only to its caller and to the learners that send weights, and reads only model folders, as safetensors.
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
        sleeps: bool = False,
        backend: Backend = "store",
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
            tensor_parallel: devices that share the model, of one node; on a CPU processes.
            sleeps: whether `sleep` frees the GPU's memory, which costs some at the start.
            backend: the way that new weights come.
            number: of this engine among the run's; its samples carry it.

        Raises:
            UserError: no such model folder, no safetensors in it, or tied embeddings on a CPU.
        """
        self._expected = tensor_names(Path(model_path))
        on_cpu = prepare_vllm()
        if on_cpu:
            refuse_tied_embeddings(model_path)
        self._engine = start(
            model=model_path,
            dtype=dtype,
            seed=seed,
            max_model_len=max_tokens,
            max_num_seqs=max_sequences,
            tensor_parallel=tensor_parallel,
            backend=backend,
            **(cpu_options(kv_cache_gib, max_tokens) if on_cpu else gpu_options(gpu_memory_utilization, sleeps)),
        )
        self._tokenizer: Any = self._engine.get_tokenizer()
        self._max_tokens, self._number = max_tokens, number
        self._version = 0
        self._first_versions: dict[str, int] = {}  # of requests whose first token is older than the present weights
        self._waiting: dict[str, Request] = {}  # what is being answered
        self._lock = Lock()  # whoever works with `_engine` holds it
        self._running = Event()  # not while weights change
        self._running.set()
        self._is_updating = False
        self._sleeps, self._asleep = sleeps and not on_cpu, list[str]()
        gc.freeze()  # what was imported and loaded stays: the collector need not go through it again and again

    @ray.method(concurrency_group="control")
    def ready(self) -> int:
        """The version of the weights that it holds; answers once the model is loaded."""
        return self._version

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        """Draw one answer a request; yields, in the order they end, those that a step of the engine finished.

        A Ray streaming generator: lists, because an object for each sample would cost about 1 ms each. A list is empty
        where nothing ended for `HEARTBEAT` seconds: an engine that yields nothing hangs. New weights may come between
        two steps; then what was begun goes on with the new ones, its keys and values computed anew. The
        same calls in the same order on a fresh engine draw the same answers. A request's own `seed` makes its
        answer independent of what is drawn beside it, up to the arithmetic's last bits; on a CPU seeds cost
        10 to 40 % more time (256 requests, vocabulary of 1,200).

        Raises:
            UserError: a prompt is empty, or leaves less than `max_new_tokens` of the engine's `max_tokens`.
        """
        for request in requests:
            check_length(request, sampling, self._max_tokens)
        waiting = self._waiting = {str(position): request for position, request in enumerate(requests)}
        try:
            self._add(waiting, sampling)
            told = time.monotonic()
            while waiting:
                done, versions = self._step()
                if done or time.monotonic() - told >= HEARTBEAT:
                    ended = [waiting.pop(output.request_id) for output in done]
                    yield to_samples(ended, done, versions, self._number, self._tokenizer) if done else []
                    told = time.monotonic()
        finally:  # the caller may stop listening
            with self._lock:
                self._engine.abort_request(list(waiting))
                self._first_versions.clear()

    # What follows may come while answers are drawn: in another thread of the actor.

    @ray.method(concurrency_group="control")
    def abort(self) -> None:
        """Draw none of the answers that are under way: nobody listens any more."""
        with self._lock:
            self._engine.abort_request(list(self._waiting))
            self._waiting.clear()

    @ray.method(concurrency_group="control")
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to a learner, as vLLM's engine of the backend does it."""
        with self._lock:
            self._on_devices("init_weight_transfer_engine", init_info)

    @ray.method(concurrency_group="control")
    def start_weight_update(self) -> None:
        """Pause the drawing after the step that is under way, until the update is finished."""
        self._running.clear()
        with self._lock:
            self._wake(["weights"])
            if self._is_updating:  # who sent the last update is gone
                self._on_devices("finish_weight_update")
            self._on_devices("start_weight_update")
            self._is_updating = True

    @ray.method(concurrency_group="control")
    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket."""
        with self._lock:
            try:
                self._on_devices("update_weights", update_info)
            except BaseException:
                self._is_updating = False  # vLLM's workers have left the update too
                raise

    @ray.method(concurrency_group="control")
    def finish_weight_update(self, version: int) -> tuple[int, str]:
        """Go on with the new weights; answers with the version and the checksum of what the loader took.

        Raises:
            StaleEngine: the update lacks tensors of the model, which would keep their old values unnoticed,
                or one device's loader took something else than another's. The engine stays paused.
        """
        with self._lock:
            receipts = self._on_devices("weights_receipt")
            self._on_devices("finish_weight_update")
            self._is_updating = False
            answer = self._adopt(version, receipts)
        self._running.set()
        return answer

    @ray.method(concurrency_group="control")
    def load_checkpoint(self, path: str, version: int) -> tuple[int, str]:
        """Replace the weights by those in a checkpoint's folder; answers and raises as `finish_weight_update`."""
        with self._lock:
            self._wake(["weights"])
            return self._adopt(version, self._on_devices("load_checkpoint_weights", path))

    @ray.method(concurrency_group="control")
    def sleep(self) -> None:
        """Leave the GPU's memory to others: weights go to main memory, keys and values are dropped.

        The engine wakes by itself: its weights when an update starts, the rest when it is asked to draw. Does nothing
        on a CPU.
        """
        with self._lock:
            assert not self._engine.has_unfinished_requests(), "answers are being drawn"
            if self._sleeps and not self._asleep:
                self._engine.sleep(level=1)
                self._asleep = ["weights", "kv_cache"]

    @ray.method(concurrency_group="control")
    def wake_up(self) -> None:
        """Take the memory back."""
        with self._lock:
            self._wake(["weights", "kv_cache"])

    def _wake(self, parts: list[str]) -> None:
        if sleeping := [part for part in self._asleep if part in parts]:
            self._engine.wake_up(sleeping)
            self._asleep = [part for part in self._asleep if part not in parts]

    def _on_devices(self, method: str, *arguments: Any) -> list[Any]:
        return self._engine.collective_rpc(method, args=arguments)

    def _adopt(self, version: int, receipts: "list[Receipt]") -> tuple[int, str]:
        checksums = [receipt.checksum for receipt in receipts]
        if len(set(checksums)) != 1:
            raise StaleEngine(f"weight update {version}: the engine's devices took different weights: {checksums}")
        missing = self._expected - receipts[0].names
        if missing:
            raise StaleEngine(
                f"weight update {version} lacks {len(missing)} of the model's {len(self._expected)} "
                f"tensors, such as {min(missing)!r}: the engine would keep their old values"
            )
        # Keys and values of the old weights go; answers that were begun wait their turn to compute them again.
        self._engine.reset_prefix_cache(reset_running_requests=True)
        for state in self._engine.output_processor.request_states.values():
            if not state.is_prefilling:  # it has tokens
                self._first_versions.setdefault(state.external_req_id, self._version)
        self._version = version
        return version, checksums[0]

    def _add(self, requests: dict[str, Request], sampling: Sampling) -> None:
        from vllm.inputs.engine import tokens_input

        with self._lock:
            self._wake(["weights", "kv_cache"])
            for key, request in requests.items():
                prompt = tokens_input(list(request.prompt_ids))
                self._engine.add_request(key, prompt, sampling_params(sampling, request.seed))

    def _step(self) -> "tuple[list[RequestOutput], list[tuple[int, int]]]":
        """What one step finished, and of each answer the versions of the weights that drew its first and last token.

        Nothing where the engine is paused for `HEARTBEAT` seconds.
        """
        if not self._running.wait(HEARTBEAT):
            return [], []
        with self._lock:  # until the versions are told: the next weights may be waiting
            if not self._running.is_set():  # a pause has begun just now
                return [], []
            done = cast("list[RequestOutput]", self._engine.step())
            last = self._version
            return done, [(self._first_versions.pop(output.request_id, last), last) for output in done]
