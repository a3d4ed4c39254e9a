"""The engines' actors: which of them serve, and what happens when one is lost."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ray.exceptions import RayActorError

from metaalign_rl.runtime.actor_calls import ActorDied, HeartbeatDeadline, first_ready, get
from metaalign_rl.runtime.actor_pool import ActorPool, Start
from metaalign_rl.runtime.faults import EngineLost, FaultLog


class EngineActors(ActorPool):
    """Rollout engines, by number.

    A replacement for a lost engine holds old weights, so it does not serve before the next weight update.

    Args:
        shares_gpus: learners and reward workers use the engines' GPUs. While vLLM loads, it takes all memory that
            disappears from its GPU for its own. So a replacement loads and goes to sleep before anything else goes on.

    Attributes:
        serving: the engines that hold the current weights, by number.
    """

    def __init__(
        self,
        start: Start,
        count: int,
        faults: FaultLog,
        deadline: Callable[[], HeartbeatDeadline],
        *,
        shares_gpus: bool = False,
    ) -> None:
        super().__init__(start, count, faults, deadline)
        self.serving, self._shares_gpus = dict(self.actors), shares_gpus
        self._replaced: set[int] = set()

    @property
    def all_serve(self) -> bool:
        """Whether every engine holds the current weights."""
        return self.serving.keys() == self.actors.keys()

    @contextmanager
    def updating(self) -> Iterator[dict[int, Any]]:
        """A context in which you give the engines new weights. After it, they serve.

        Waits until new engines have loaded their model. If an engine is lost, it is replaced and `all_serve` is False
        afterwards: update again.

        Raises:
            TooManyFaults: an engine was lost too often.
        """
        engines = self._loaded()
        try:
            yield engines
        except EngineLost as lost:
            self.replace_engine(lost, engines[lost.number])
            return
        with self._replacing:
            self.serving = {number: engine for number, engine in engines.items() if self.actors[number] is engine}

    def replace_engine(self, lost: EngineLost, engine: Any) -> None:
        """Start a new engine in place of `engine`; see `updating`.

        Raises:
            TooManyFaults: this engine was lost too often.
        """
        if self.replace(lost.number, lost, engine):
            with self._replacing:
                self.serving = {number: other for number, other in self.serving.items() if other is not engine}
                self._replaced.add(lost.number)
            if self._shares_gpus:
                self.settle()

    def settle(self) -> None:
        """Wait until new engines have loaded their models, and have them sleep.

        Raises:
            TooManyFaults: an engine was lost too often.
        """
        new = self._loading()
        engines = self._loaded()
        self.tell({number: engines[number].sleep.remote() for number in new}, "sleep")

    def ask(self, calls: Mapping[int, Any], method: str) -> dict[int, Any]:
        """The results of one call to each of some engines, by number.

        Raises:
            EngineLost: an engine died, or sent no heartbeat in time.
        """
        for number in calls:
            self.deadlines[number].reset()
        return {number: self._answer(number, call, method) for number, call in calls.items()}

    def tell(self, calls: Mapping[int, Any], method: str) -> None:
        """Wait until the engines have finished a call. A lost engine is noticed at its next weight update."""
        for number in calls:
            self.deadlines[number].reset()
        for number, call in calls.items():
            with suppress(EngineLost):
                self._answer(number, call, method)

    def _loaded(self) -> dict[int, Any]:
        """All engines, once their models are loaded. Engines that are lost while they load are replaced."""
        while True:
            engines, new = dict(self.actors), self._loading()
            try:
                self.ask({number: engine.ready.remote() for number, engine in new.items()}, "loading")
                return engines
            except EngineLost as lost:
                self.replace_engine(lost, engines[lost.number])

    def _loading(self) -> dict[int, Any]:
        return {number: engine for number, engine in self.actors.items() if not self.deadlines[number].has_started}

    def _answer(self, number: int, call: Any, method: str) -> Any:
        deadline = self.deadlines[number]
        if first_ready([call], deadline.seconds_left()) is None:
            raise EngineLost(number, deadline.timeout_error(method))
        try:
            answer = get(call)
        except ActorDied as error:
            raise EngineLost(number, error) from error
        except RayActorError as error:  # its `__init__` failed; that of the engine before it did not
            if number not in self._replaced:
                raise
            raise EngineLost(number, error) from error
        deadline.record_heartbeat()
        return answer
