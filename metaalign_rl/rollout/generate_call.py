"""One round of requests over the rollout engines, those of an engine that is lost being asked again."""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from metaalign_rl.core.dataflow import Request, Sample, Sampling
from metaalign_rl.runtime.actor_calls import ActorDied, first_ready, get
from metaalign_rl.runtime.faults import EngineLost, GenerationCancelled, StepInterrupted

if TYPE_CHECKING:
    from metaalign_rl.rollout.engine_pool import EnginePool

LOOK = 1.0  # seconds after which a round looks whether it is still wanted


class GenerateCall:
    """The requests of one call of `generate` under way."""

    def __init__(self, pool: "EnginePool", sampling: Sampling) -> None:
        self._pool, self._sampling = pool, sampling
        self._streams: dict[Any, int] = {}  # a stream of samples, by the number of the engine it comes from
        self._open: dict[int, dict[int, Request]] = {}  # what an engine has not answered, by the request's index
        self._engines: dict[int, Any] = {}  # those that were asked

    def deal_out(self, requests: list[Request]) -> None:
        """Send the serving engines a share each; where none is left, those in their place, once they serve.

        Neighbours go to one engine: answers to a prompt stand side by side, so it is read once and they end together.
        """
        while not self._pool.serving:
            self._pool.revive()
        serving = sorted(self._pool.serving.items())
        bounds = [len(requests) * place // len(serving) for place in range(len(serving) + 1)]
        for (number, engine), (start, end) in zip(serving, pairwise(bounds), strict=True):
            if start < end:
                self._ask(number, engine, requests[start:end])

    def _ask(self, number: int, engine: Any, requests: list[Request]) -> None:
        """Send an engine requests; they come after those that it has."""
        if number not in self._open:
            self._pool.clocks[number].reset()
        self._engines[number] = engine
        stream = engine.generate.options(num_returns="streaming").remote(requests, self._sampling)
        self._streams[stream] = number
        self._open.setdefault(number, {}).update({request.index: request for request in requests})

    def samples(self) -> Iterator[list[Sample]]:
        """What the engines finish, until everything is answered."""
        while self._open:
            if self._pool.unwanted.is_set():
                raise GenerationCancelled("nobody wants these answers any more")
            left = min(self._pool.clocks[number].seconds_left() for number in self._open)
            stream = first_ready(list(self._streams), min(LOOK, left))
            if stream is None:
                self._replace_silent()
                continue
            try:
                finished = get(next(stream))
            except StopIteration:
                del self._streams[stream]  # this engine has answered everything
                continue
            except ActorDied as error:
                self._replace(EngineLost(self._streams[stream], error))
                continue
            number = self._streams[stream]
            self._pool.clocks[number].record_heartbeat()
            for sample in finished:
                del self._open[number][sample.index]
            if not self._open[number]:
                del self._open[number]
            if finished:
                yield finished

    def close(self) -> None:
        """Tell the engines that nobody listens any more."""
        self._pool.tell({number: self._engines[number].abort.remote() for number in self._open}, "abort")

    def _replace_silent(self) -> None:
        for number in list(self._open):
            clock = self._pool.clocks[number]
            if clock.seconds_left() <= 0:
                self._replace(EngineLost(number, clock.timeout_error("generate")))

    def _replace(self, lost: EngineLost) -> None:
        """Have what the lost engine had not answered answered by the others, or by the one in its place."""
        self._pool.replace(lost, self._engines[lost.number])
        self._streams = {stream: number for stream, number in self._streams.items() if number != lost.number}
        orphans = list(self._open.pop(lost.number, {}).values())
        if self._pool.whole_steps:
            raise StepInterrupted(str(lost))
        self.deal_out(orphans)
