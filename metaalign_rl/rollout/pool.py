"""All rollout engines of a run as one: requests go out over them, samples stream back as they finish."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from metaalign_rl.config import Config
from metaalign_rl.rollout.engine import THREADS, RolloutEngine
from metaalign_rl.rollout.types import Request, Sample, Sampling
from metaalign_rl.runtime import actor_options
from metaalign_rl.weights import confirm
from metaalign_rl.weights.route import backend_of


class EnginePool:
    """The rollout engines, Ray actors that all hold the same weights."""

    def __init__(self, engines: list[Any]) -> None:
        self.engines = engines

    @classmethod
    def start(cls, config: Config, model_path: Path) -> "EnginePool":
        """Start the engines; they load `model_path` while the caller goes on."""
        rollout = config.rollout
        actor = ray.remote(**THREADS)(RolloutEngine)
        engines = [
            actor.options(**actor_options(config, "rollout", rollout.engines, index)).remote(
                str(model_path),
                max_tokens=config.model.max_tokens,
                max_sequences=rollout.max_sequences,
                dtype=config.model.dtype,
                seed=config.run.seed + index,
                kv_cache_gib=rollout.kv_cache_gib,
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                tensor_parallel=rollout.tensor_parallel,
                sleeps=config.cluster.layout == "colocated",
                backend=backend_of(config),
                threads=config.cluster.cpus,
                number=index,
            )
            for index in range(rollout.engines)
        ]
        return cls(engines)

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        """Samples as they finish, in no fixed order; each carries its request's index."""
        count = len(self.engines)
        shares = [requests[start::count] for start in range(count)]
        streams = [
            engine.generate.options(num_returns="streaming").remote(share, sampling)
            for engine, share in zip(self.engines, shares, strict=True)
            if share
        ]
        while streams:
            ready, streams = ray.wait(streams, num_returns=1)
            try:
                yield ray.get(next(ready[0]))
                streams.append(ready[0])
            except StopIteration:
                pass  # this engine has answered everything

    def answer(self, prompts: list[list[int]], sampling: Sampling) -> list[Sample]:
        """One sample a prompt, in the prompts' order."""
        requests = [Request(index, ids) for index, ids in enumerate(prompts)]
        samples = [sample for part in self.generate(requests, sampling) for sample in part]
        return sorted(samples, key=lambda sample: sample.index)

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Give every engine the weights in a checkpoint's folder, which all nodes see.

        Raises:
            StaleEngine: an engine took something else than the first one.
        """
        version = max(ray.get([engine.ready.remote() for engine in self.engines])) + 1
        answers = ray.get([engine.load_checkpoint.remote(str(checkpoint), version) for engine in self.engines])
        for index, answer in enumerate(answers):
            confirm(answers[0], answer, engine=f"rollout engine {index}")

    def stop(self) -> None:
        """End the engines' processes."""
        for engine in self.engines:
            ray.kill(engine)
