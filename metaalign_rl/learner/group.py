"""All learner ranks of a run as one."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Batch
from metaalign_rl.learner.worker import Learner
from metaalign_rl.runtime.actor_calls import ActorDied, HeartbeatDeadline, first_ready, get, kill
from metaalign_rl.runtime.faults import LearnersLost
from metaalign_rl.runtime.ray_session import actor_options
from metaalign_rl.runtime.rendezvous import rendezvous

# Seconds in which the rank shows up whose death made another one's collective operation fail: of a process Ray knows at
# once, of a node that stopped answering after about a minute.
GRACE = 90.0


class Models(NamedTuple):
    """The checkpoints that the learners start from; without a critic for algorithms that have none."""

    policy: Path
    critic: Path | None
    reference: Path


class PendingCall(NamedTuple):
    """A method under way on every rank."""

    method: str
    answers: list[Any]


class LearnerGroup:
    """The learners, one Ray actor a rank. Every call goes to all ranks; rank 0's answer is the group's.

    Any call may raise `LearnersLost`: a rank died or hangs. `restart` makes a new group, which is to be given the
    state of a checkpoint, or stands at the start.
    """

    def __init__(self, config: Config, models: Models) -> None:
        """Start the ranks; they load their models while the caller goes on."""
        config.learner.check_dtype(config.model.dtype)
        self._config, self._models = config, models
        self._lock = threading.Lock()  # ranks must get their calls in one order, whichever thread makes them
        self.ranks: list[Any] = []
        self._launch()

    def wait(self) -> None:
        """Return once all models are loaded."""
        self.result(self._ready)

    def begin_evaluate(self, batch: Batch) -> PendingCall:
        """Have the log-probabilities of policy and reference, and values, computed while the caller goes on."""
        return self._begin("evaluate", ray.put(batch))

    def begin_train(self, batch: Batch, kl_coef: float = 0.0) -> PendingCall:
        """Begin one update, with the KL in the loss by `kl_coef`; see `Learner.train`."""
        return self._begin("train", ray.put(batch), kl_coef, self._config.ppo.kl_by)

    def save_policy(self, path: Path) -> None:
        """Write the policy as a Hugging Face checkpoint."""
        self.call("save_policy", path)

    def save_state(self, path: Path) -> None:
        """Write all that the next update depends on."""
        self.call("save_state", path)

    def load_state(self, path: Path) -> None:
        """Take up what `save_state` wrote."""
        self.call("load_state", path)

    def restart(self) -> None:
        """Put a new group, at the start, in the place of one that is lost."""
        self.stop()
        self._launch()
        self.wait()

    def stop(self) -> None:
        """End the ranks' processes; where they met they may meet again until then."""
        for rank in self.ranks:
            kill(rank)
        Path(self._meeting.removeprefix("file://")).unlink(missing_ok=True)

    def call(self, method: str, *arguments: Any) -> Any:
        """Rank 0's answer to a method of `Learner` that every rank runs."""
        return self.result(self._begin(method, *arguments))

    def result(self, call: PendingCall) -> Any:
        """Rank 0's answer, once every rank has answered."""
        waiting, clock = dict(zip(call.answers, range(len(call.answers)), strict=True)), self._patience()
        answers: dict[int, Any] = {}
        while waiting:
            answer = first_ready(list(waiting), clock.left())
            if answer is None:
                ranks = ", ".join(map(str, waiting.values()))
                raise LearnersLost(f"learner rank {ranks}", clock.error(call.method))
            try:
                answers[waiting[answer]] = get(answer)
            except Exception as error:
                if lost := self._lost_rank(waiting):
                    raise lost from error
                raise
            del waiting[answer]
        return answers[0]

    def _launch(self) -> None:
        config = self._config
        actor, ranks = ray.remote(Learner), config.learner.world_size
        settings = replace(config.learner, total_steps=config.learner.total_steps or optimizer_steps(config))
        self._meeting, same = rendezvous(config), {"dtype": config.model.dtype, "seed": config.run.seed}
        self.ranks = [
            actor.options(**actor_options(config, "learner", ranks, rank)).remote(
                settings, rank, ranks, self._meeting, **same
            )
            for rank in range(ranks)
        ]
        self._ready = self._begin("setup", *self._models)

    def _patience(self) -> HeartbeatDeadline:
        """Learners say nothing while they work, and a call may wait for others: the longer limit counts."""
        return HeartbeatDeadline(self._config.faults.start_s, self._config.faults.silence_s)

    def _lost_rank(self, waiting: dict[Any, int]) -> LearnersLost | None:
        """The rank that is gone, if any: where one dies, the others' errors are only that they miss it."""
        clock = HeartbeatDeadline(GRACE, GRACE)
        left = dict(waiting)
        while left and (answer := first_ready(list(left), clock.left())) is not None:
            rank = left.pop(answer)
            try:
                get(answer)
            except ActorDied as error:
                return LearnersLost(f"learner rank {rank}", error)
            except Exception:
                continue
        return None

    def _begin(self, method: str, *arguments: Any) -> PendingCall:
        with self._lock:
            return PendingCall(method, [getattr(rank, method).remote(*arguments) for rank in self.ranks])


def optimizer_steps(config: Config) -> int:
    """The optimizer steps of a whole PPO run."""
    minibatches = -(-config.ppo.prompts_per_step * config.ppo.samples_per_prompt // config.learner.minibatch_size)
    return config.ppo.steps * config.learner.epochs * minibatches
