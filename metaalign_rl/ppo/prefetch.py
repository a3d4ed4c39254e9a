"""Collect the next step's experience while the learners work on this one (`ppo.staleness=1`)."""

from concurrent.futures import Future, ThreadPoolExecutor, wait

from metaalign_rl.config.schema import Config
from metaalign_rl.ppo.collector import Collector, Experience
from metaalign_rl.ppo.step_timer import StepTimer
from metaalign_rl.rollout.engine_pool import EnginePool


class Prefetch:
    """Experience by step: collected ahead in a thread if staleness is allowed, else when it is asked for."""

    def __init__(self, config: Config, collector: Collector, engines: EnginePool) -> None:
        self._config, self._collector, self._engines = config, collector, engines
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self._next: Future[Experience] | None = None

    def next(self, step: int) -> Experience:
        """The experience of `step`. If it was prefetched, its seconds are those spent waiting for it here."""
        if self._next is None:
            return self._collector.collect(step)
        timer = StepTimer()
        with timer.part("rollout"):
            rollouts, batch, _ = self._next.result()
        self._next = None
        return Experience(rollouts, batch, timer.seconds)

    def start(self, step: int) -> None:
        """Begin to collect `step`, if staleness is allowed and the run has such a step."""
        if self._config.ppo.staleness and step < self._config.ppo.steps:
            self._next = self._thread.submit(self._collector.collect, step)

    def wait_unless_in_flight(self) -> None:
        """Wait until generation has ended, unless engines may take new weights in the middle of a response."""
        if not self._config.ppo.in_flight:
            self.wait()

    def wait(self) -> None:
        """Wait until the next step's experience is collected, if it is being collected."""
        if self._next is not None:
            wait([self._next])

    def cancel(self) -> None:
        """Cancel the prefetched rollout and wait for its thread."""
        if self._next is not None:
            # Waiting alone is not enough: engines stay paused if the learners died while they sent weights.
            with self._engines.cancelling():
                wait([self._next])
            self._next = None

    def close(self) -> None:
        """Cancel and end the thread, which would keep the process alive and replace engines that are being stopped."""
        self.cancel()
        self._thread.shutdown()
