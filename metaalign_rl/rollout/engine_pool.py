"""The pool of a run's rollout engines: it splits requests over them, and samples stream back as they finish.

An engine that dies or hangs is replaced. Its unfinished requests go to the other engines. The replacement serves after
the next weight update.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Request, Sample, Sampling
from metaalign_rl.rollout.engine import THREADS, RolloutEngine
from metaalign_rl.rollout.engine_actors import EngineActors
from metaalign_rl.rollout.generate_call import GenerateCall, NoEngineServing
from metaalign_rl.runtime.actor_calls import HeartbeatDeadline
from metaalign_rl.runtime.actor_options import actor_options
from metaalign_rl.runtime.faults import FaultLog, StepInterrupted
from metaalign_rl.weights import confirm
from metaalign_rl.weights.sync_plan import backend_of


class EnginePool:
    """The rollout engines, Ray actors that all hold the same weights.

    Args:
        start: starts the engine of a number without waiting until its model is loaded.
        deadline: makes an engine's heartbeat deadline.
        checkpoint: the model folder that `start` loads.
        whole_steps: raise `StepInterrupted` if an engine is lost: the last bits of a response depend on which other
            requests share its batch, so a deterministic run must repeat the step.
        shares_gpus: see `EngineActors`.

    Attributes:
        actors: the engines' actors.
    """

    def __init__(
        self,
        start: Callable[[int], Any],
        count: int,
        faults: FaultLog,
        deadline: Callable[[], HeartbeatDeadline],
        *,
        checkpoint: Path | None = None,
        whole_steps: bool = False,
        shares_gpus: bool = False,
    ) -> None:
        self.actors = EngineActors(start, count, faults, deadline, shares_gpus=shares_gpus)
        self._checkpoint, self._whole_steps = checkpoint, whole_steps
        self._cancelled = threading.Event()

    @classmethod
    def start(cls, config: Config, checkpoint: Path, faults: FaultLog) -> "EnginePool":
        """Start a run's engines on the model folder `checkpoint`."""
        rollout, limits = config.rollout, config.faults
        actor = ray.remote(**THREADS)(RolloutEngine)

        def start(number: int) -> Any:
            return actor.options(**actor_options(config, "rollout", rollout.engines, number)).remote(
                str(checkpoint),
                max_tokens=config.model.max_tokens,
                max_sequences=rollout.max_sequences,
                dtype=config.model.dtype,
                seed=config.run.seed + number,
                kv_cache_gib=rollout.kv_cache_gib,
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                batch_tokens=rollout.batch_tokens,
                tensor_parallel=rollout.tensor_parallel,
                sleeps=config.cluster.layout == "colocated",
                backend=backend_of(config),
                number=number,
                temperature=rollout.temperature,
            )

        deadline = partial(HeartbeatDeadline, limits.start_s, limits.silence_s)
        options = {"whole_steps": config.ppo.deterministic, "shares_gpus": config.shares_gpus}
        return cls(start, rollout.engines, faults, deadline, checkpoint=checkpoint, **options)

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        """Samples as they finish, in no fixed order; each carries its request's index.

        Raises:
            StepInterrupted: an engine was lost, and a deterministic run must repeat the step.
            NoEngineServing: every engine that held the current weights was lost.
            GenerationCancelled: another thread called `cancelling`.
            TooManyFaults: engines were lost too often.
        """
        call = GenerateCall(self.actors, sampling, self._cancelled, whole_steps=self._whole_steps)
        try:
            call.dispatch(requests)
            yield from call.samples()
        finally:
            call.close()

    @contextmanager
    def cancelling(self) -> Iterator[None]:
        """A context that ends a `generate` in another thread with `GenerationCancelled`, even if its engines hang."""
        self._cancelled.set()
        try:
            yield
        finally:
            self._cancelled.clear()

    def answer(self, prompts: list[list[int]], sampling: Sampling) -> list[Sample]:
        """One sample per prompt, in the prompts' order, from the checkpoint's weights.

        Raises:
            TooManyFaults: engines were lost too often.
        """
        requests = [Request(index, ids) for index, ids in enumerate(prompts)]
        samples: dict[int, Sample] = {}
        while len(samples) < len(requests):
            try:
                for part in self.generate([r for r in requests if r.index not in samples], sampling):
                    samples |= {sample.index: sample for sample in part}
            except (NoEngineServing, StepInterrupted) as error:
                if isinstance(error, StepInterrupted):
                    samples.clear()
                self._update_from_checkpoint()
        return [samples[request.index] for request in requests]

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Give every engine the weights in a checkpoint's folder, which all nodes can read.

        Raises:
            StaleEngine: engines loaded different weights.
            TooManyFaults: engines were lost too often.
        """
        self._checkpoint = checkpoint
        self._update_from_checkpoint()

    def sleep(self, keep_weights: bool = False) -> None:
        """Free the engines' device memory for others; the engines wake up when they are needed.

        Args:
            keep_weights: else a weight update must follow.
        """
        calls = {number: engine.sleep.remote(keep_weights) for number, engine in self.actors.actors.items()}
        self.actors.tell(calls, "sleep")

    def settle(self) -> None:
        """Return when the engines have loaded and sleep, so that other processes can start on their devices.

        Raises:
            TooManyFaults: engines were lost too often.
        """
        self.actors.settle()
        self.sleep()

    def stop(self) -> None:
        """Kill the engines' processes."""
        self.actors.stop()

    def _update_from_checkpoint(self) -> None:
        is_done = False
        while not is_done:
            with self.actors.updating() as engines:
                self._load(engines)
            is_done = self.actors.all_serve

    def _load(self, engines: dict[int, Any]) -> None:
        path, ask = str(self._checkpoint), self.actors.ask
        held = ask({number: engine.ready.remote() for number, engine in engines.items()}, "ready")
        version = max(held.values()) + 1
        calls = {number: engine.load_checkpoint.remote(path, version) for number, engine in engines.items()}
        answers = ask(calls, "load_checkpoint")
        for number, answer in answers.items():
            confirm(next(iter(answers.values())), answer, engine=f"rollout engine {number}")
