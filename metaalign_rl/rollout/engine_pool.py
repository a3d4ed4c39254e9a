"""All rollout engines of a run as one: requests go out over them, samples stream back as they finish.

An engine that dies or hangs is replaced. Its unfinished requests go to the others, and the new one serves from the
next weights on; where none is left, the new one takes them over, with the present weights.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Request, Sample, Sampling
from metaalign_rl.rollout.engine import THREADS, RolloutEngine
from metaalign_rl.rollout.generate_call import GenerateCall
from metaalign_rl.runtime.actor_calls import ActorDied, HeartbeatDeadline, first_ready, get, kill
from metaalign_rl.runtime.actor_options import actor_options
from metaalign_rl.runtime.faults import EngineLost, FaultLog
from metaalign_rl.weights import confirm
from metaalign_rl.weights.sync_plan import backend_of

Engines = Mapping[int, Any]  # Ray actors by number
Send = Callable[[Engines], None]  # gives engines their weights; raises EngineLost


class EnginePool:
    """The rollout engines, Ray actors that all hold the same weights.

    Args:
        start: makes the engine of a number; it loads its model while the caller goes on.
        patience: makes the clock of an engine's signs of life.
        whole_steps: raise `StepInterrupted` where an engine was replaced, since answers depend, in their last bits,
            on what is drawn beside them.

    Attributes:
        engines: by their numbers; a new one may be loading still.
        clocks: of their signs of life.
        serving: those that hold the present weights, by number.
        unwanted: set while nobody wants what is being drawn.
    """

    def __init__(
        self,
        start: Callable[[int], Any],
        count: int,
        faults: FaultLog,
        patience: Callable[[], HeartbeatDeadline],
        *,
        whole_steps: bool = False,
    ) -> None:
        self._start, self._faults, self._patience = start, faults, patience
        self.whole_steps = whole_steps
        self._send: Send = _nothing
        self.clocks: dict[int, HeartbeatDeadline] = {}
        self.engines: dict[int, Any] = {}
        for number in range(count):
            self._launch(number)
        self.serving = dict(self.engines)
        self._loading = threading.Lock()  # an engine takes one update at a time, whichever thread brings it
        self._replacing = threading.Lock()
        self.unwanted = threading.Event()

    @classmethod
    def start(cls, config: Config, model_path: Path, faults: FaultLog) -> "EnginePool":
        """Start the engines of a run on the checkpoint `model_path`."""
        rollout = config.rollout
        actor = ray.remote(**THREADS)(RolloutEngine)

        def start(number: int) -> Any:
            return actor.options(**actor_options(config, "rollout", rollout.engines, number)).remote(
                str(model_path),
                max_tokens=config.model.max_tokens,
                max_sequences=rollout.max_sequences,
                dtype=config.model.dtype,
                seed=config.run.seed + number,
                kv_cache_gib=rollout.kv_cache_gib,
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                tensor_parallel=rollout.tensor_parallel,
                sleeps=config.cluster.layout == "colocated",
                backend=backend_of(config),
                number=number,
            )

        limits = config.faults
        patience = partial(HeartbeatDeadline, limits.start_s, limits.silence_s)
        return cls(start, rollout.engines, faults, patience, whole_steps=config.ppo.deterministic)

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        """Samples as they finish, in no fixed order; each carries its request's index.

        Raises:
            StepInterrupted: an engine was replaced, and steps are to be whole.
            Abandoned: nobody wants the samples any more.
            TooManyFaults: engines broke again and again.
        """
        round_ = GenerateCall(self, sampling)
        try:
            round_.deal_out(requests)
            yield from round_.samples()
        finally:
            round_.close()

    @contextmanager
    def abandoned(self) -> Iterator[None]:
        """Meanwhile a `generate` in another thread soon ends in `Abandoned`, whatever its engines do."""
        self.unwanted.set()
        try:
            yield
        finally:
            self.unwanted.clear()

    def answer(self, prompts: list[list[int]], sampling: Sampling) -> list[Sample]:
        """One sample a prompt, in the prompts' order."""
        requests = [Request(index, ids) for index, ids in enumerate(prompts)]
        samples = [sample for part in self.generate(requests, sampling) for sample in part]
        return sorted(samples, key=lambda sample: sample.index)

    def load(self, send: Send) -> None:
        """Give every engine new weights by `send`, which also serves engines that take a lost one's place later.

        Raises:
            StaleEngine: an engine took something else.
            TooManyFaults: engines broke again and again.
        """
        with self._loading:
            self._send = send
            self._load()

    def _load(self) -> None:
        while not self._try_to_load(dict(self.engines)):
            pass

    def _try_to_load(self, engines: dict[int, Any]) -> bool:
        """Give all of `engines` weights; False where one of them had to be replaced."""
        try:
            new = {number: engine for number, engine in engines.items() if not self.clocks[number].has_started}
            self.ask({number: engine.ready.remote() for number, engine in new.items()}, "loading")
            self._send(engines)
        except EngineLost as lost:
            self.replace(lost, engines[lost.number])
            return False
        with self._replacing:
            self.serving = {number: engine for number, engine in engines.items() if self.engines[number] is engine}
        return True

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Give every engine the weights in a checkpoint's folder, which all nodes see.

        Raises:
            StaleEngine: an engine took something else than the first one.
        """
        self.load(lambda engines: self._load_checkpoint(checkpoint, engines))

    def _load_checkpoint(self, checkpoint: Path, engines: Engines) -> None:
        held = self.ask({number: engine.ready.remote() for number, engine in engines.items()}, "ready")
        version = max(held.values()) + 1
        calls = {number: engine.load_checkpoint.remote(str(checkpoint), version) for number, engine in engines.items()}
        answers = self.ask(calls, "load_checkpoint")
        for number, answer in answers.items():
            confirm(next(iter(answers.values())), answer, engine=f"rollout engine {number}")

    def sleep(self) -> None:
        """Have the engines leave their devices' memory to the learners; they wake by themselves."""
        self.tell({number: engine.sleep.remote() for number, engine in self.engines.items()}, "sleep")

    def replace(self, lost: EngineLost, engine: Any) -> None:
        """Start a new engine in the place of `engine`; it serves when it has been given weights."""
        with self._replacing:
            if self.engines[lost.number] is not engine:
                return  # another thread has found that out
            self._faults.record(lost, "a new one replaces it")
            kill(engine)
            self.serving = {number: other for number, other in self.serving.items() if number != lost.number}
            self._launch(lost.number)

    def revive(self) -> None:
        """Give the present weights to the engines that were started meanwhile, and let them serve."""
        with self._loading:  # another thread may be bringing newer weights
            if self.serving.keys() != self.engines.keys():
                self._load()

    def ask(self, calls: Mapping[int, Any], method: str) -> dict[int, Any]:
        """The answers to a call of each of some engines, by number.

        Raises:
            EngineLost: one of them is gone, or hangs.
        """
        for number in calls:
            self.clocks[number].reset()
        return {number: self._answer(number, call, method) for number, call in calls.items()}

    def tell(self, calls: Mapping[int, Any], method: str) -> None:
        """Wait until the engines have done a call each; one that is lost is found out at its next weights."""
        for number in calls:
            self.clocks[number].reset()
        for number, call in calls.items():
            with suppress(EngineLost):
                self._answer(number, call, method)

    def stop(self) -> None:
        """End the engines' processes."""
        for engine in self.engines.values():
            kill(engine)

    def _launch(self, number: int) -> None:
        self.engines[number] = self._start(number)
        self.clocks[number] = self._patience()

    def _answer(self, number: int, call: Any, method: str) -> Any:
        clock = self.clocks[number]
        if first_ready([call], clock.seconds_left()) is None:
            raise EngineLost(number, clock.timeout_error(method))
        try:
            answer = get(call)
        except ActorDied as error:
            raise EngineLost(number, error) from error
        clock.record_heartbeat()
        return answer


def _nothing(engines: Engines) -> None:
    """New engines hold the weights of the checkpoint that they loaded."""
