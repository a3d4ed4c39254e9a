"""One call of `EnginePool.generate`: requests go out to the engines, samples come back as they finish."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from threading import Event
from typing import Any

from metaalign_rl.core.dataflow import Request, Sample, Sampling
from metaalign_rl.rollout.engine_actors import EngineActors
from metaalign_rl.runtime.actor_calls import ActorDied, first_ready, get
from metaalign_rl.runtime.faults import EngineLost, GenerationCancelled, StepInterrupted

POLL_S = 1.0  # seconds between two looks at `cancelled`


class NoEngineServing(RuntimeError):
    """Every engine that held the current weights is lost. Update the replacements' weights, then generate `unanswered`.

    Attributes:
        unanswered: the requests without a sample.
    """

    def __init__(self, unanswered: list[Request]) -> None:
        super().__init__(f"no engine holds the current weights; {len(unanswered)} requests are unanswered")
        self.unanswered = unanswered


class GenerateCall:
    """The requests of one call in progress.

    Args:
        cancelled: ends the call when set.
        whole_steps: end the call when an engine is lost, instead of sending its requests to another one.
    """

    def __init__(self, engines: EngineActors, sampling: Sampling, cancelled: Event, *, whole_steps: bool) -> None:
        self._engines, self._sampling = engines, sampling
        self._cancelled, self._whole_steps = cancelled, whole_steps
        self._asked: dict[int, Any] = {}  # by number, the actor that got requests
        self._streams: dict[Any, int] = {}  # a stream of samples -> number of its engine
        self._open: dict[int, dict[int, Request]] = {}  # by engine and index, requests without a sample
        self._waiting: list[Request] = []  # requests that no engine could take

    def dispatch(self, requests: Sequence[Request]) -> None:
        """Split the requests over the serving engines.

        Neighbours go to the same engine. They answer the same prompt, so the engine reads it once and the samples
        finish together.
        """
        serving = sorted(self._engines.serving.items())
        if not serving:
            self._waiting += requests
            return
        bounds = [len(requests) * place // len(serving) for place in range(len(serving) + 1)]
        for (number, engine), (start, end) in zip(serving, pairwise(bounds), strict=True):
            if start < end:
                self._ask(number, engine, requests[start:end])

    def samples(self) -> Iterator[list[Sample]]:
        """Samples as the engines finish them, until every request has one.

        Raises:
            GenerationCancelled, StepInterrupted, NoEngineServing, TooManyFaults: see `EnginePool.generate`.
        """
        while self._open:
            if self._cancelled.is_set():
                raise GenerationCancelled("the caller cancelled this generation")
            left = min(self._engines.deadlines[number].seconds_left() for number in self._open)
            stream = first_ready(list(self._streams), min(POLL_S, left))
            if stream is None:
                self._replace_silent()
                continue
            number = self._streams[stream]
            try:
                finished: list[Sample] = get(next(stream))
            except StopIteration:
                del self._streams[stream]  # this engine has answered everything
                continue
            except ActorDied as error:
                self._replace(EngineLost(number, error))
                continue
            self._engines.deadlines[number].record_heartbeat()
            self._close_requests(number, finished)
            if finished:
                yield finished
        if self._waiting:
            raise NoEngineServing(self._waiting)

    def close(self) -> None:
        """Stop the engines with unfinished requests."""
        self._engines.tell({number: self._asked[number].abort.remote() for number in self._open}, "abort")

    def _ask(self, number: int, engine: Any, requests: Sequence[Request]) -> None:
        """Send requests to an engine; it queues them after those that it has."""
        if number not in self._open:
            self._engines.deadlines[number].reset()
        self._asked[number] = engine
        stream = engine.generate.options(num_returns="streaming").remote(list(requests), self._sampling)
        self._streams[stream] = number
        self._open.setdefault(number, {}).update({request.index: request for request in requests})

    def _close_requests(self, number: int, finished: Sequence[Sample]) -> None:
        for sample in finished:
            del self._open[number][sample.index]
        if not self._open[number]:
            del self._open[number]

    def _replace_silent(self) -> None:
        for number in list(self._open):
            deadline = self._engines.deadlines[number]
            if deadline.seconds_left() <= 0:
                self._replace(EngineLost(number, deadline.timeout_error("generate")))

    def _replace(self, lost: EngineLost) -> None:
        """Replace a lost engine and give its open requests to the others."""
        self._engines.replace_engine(lost, self._asked[lost.number])
        self._streams = {stream: number for stream, number in self._streams.items() if number != lost.number}
        orphans = list(self._open.pop(lost.number, {}).values())
        if self._whole_steps:
            raise StepInterrupted(str(lost))
        self.dispatch(orphans)
