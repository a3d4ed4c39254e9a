"""The group of all learner ranks of a run."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Batch
from metaalign_rl.learner.worker import Learner
from metaalign_rl.runtime.actor_calls import ActorDied, HeartbeatDeadline, first_ready, get, kill
from metaalign_rl.runtime.actor_options import actor_options
from metaalign_rl.runtime.faults import LearnersLost
from metaalign_rl.runtime.rendezvous import rendezvous

# Seconds until Ray reports the rank whose death made another rank's collective operation fail. Ray reports a dead
# process immediately, and a dead node after about a minute.
GRACE = 90.0
# These load models, or wait for engines, which have `faults.silence_s` for each call themselves.
PATIENT = ("setup", "load_state", "connect_weights", "send_weights")


class Models(NamedTuple):
    """The checkpoints that the learners start from. `critic` is None for algorithms without a critic."""

    policy: Path
    critic: Path | None
    reference: Path


class PendingCall(NamedTuple):
    """A call in progress on every rank."""

    method: str
    answers: list[Any]


class LearnerGroup:
    """The learners, one Ray actor per rank. Every call goes to all ranks; rank 0's result is the group's.

    Any call may raise `LearnersLost`: a rank died or hangs. Then `stop` and `start` make a new group, which is at the
    start of training until `load_state`.
    """

    def __init__(self, config: Config, models: Models) -> None:
        """Start the ranks without waiting until their models are loaded."""
        config.learner.check_dtype(config.model.dtype)
        self._config, self._models = config, models
        self._lock = threading.Lock()  # all ranks must get calls from different threads in the same order
        self._heard = 0  # calls that all ranks have answered
        self.ranks: list[Any] = []
        self._launch()

    def start(self) -> None:
        """Start the ranks if they are stopped, and return when all models are loaded."""
        if not self.ranks:
            self._launch()
        self.result(self._ready)

    def begin_evaluate(self, batch: Batch) -> PendingCall:
        """Begin to compute log-probabilities of policy and reference, and values; see `Learner.evaluate`."""
        return self._begin("evaluate", ray.put(batch))

    def begin_train(self, batch: Batch, kl_coef: float = 0.0) -> PendingCall:
        """Begin one update; see `Learner.train`. `kl_coef`: coefficient of the KL in the loss."""
        return self._begin("train", ray.put(batch), kl_coef, self._config.ppo.kl_by)

    def save_policy(self, path: Path) -> None:
        """Write the policy as a Hugging Face checkpoint."""
        self.call("save_policy", path)

    def save_state(self, path: Path) -> None:
        """Write the complete training state."""
        self.call("save_state", path)

    def load_state(self, path: Path) -> None:
        """Load what `save_state` wrote."""
        self.call("load_state", path)

    def stop(self) -> None:
        """Kill the ranks and delete their rendezvous file."""
        for rank in self.ranks:
            kill(rank)
        self.ranks = []
        Path(self._meeting.removeprefix("file://")).unlink(missing_ok=True)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of `Learner` on every rank; rank 0's result."""
        return self.result(self._begin(method, *arguments))

    def result(self, call: PendingCall) -> Any:
        """Wait for every rank; rank 0's result."""
        waiting, deadline = dict(zip(call.answers, range(len(call.answers)), strict=True)), self._deadline(call)
        answers: dict[int, Any] = {}
        heard = self._heard
        while waiting:
            answer = first_ready(list(waiting), deadline.seconds_left())
            if answer is None and heard != self._heard:  # an earlier call has ended, so this one has just begun
                heard = self._heard
                deadline.reset()
                continue
            if answer is None:
                ranks = ", ".join(map(str, waiting.values()))
                raise LearnersLost(f"learner rank {ranks}", deadline.timeout_error(call.method))
            try:
                answers[waiting[answer]] = get(answer)
            except Exception as error:
                if lost := self._lost_rank(waiting):
                    raise lost from error
                raise
            del waiting[answer]
        self._heard += 1
        return answers[0]

    def _launch(self) -> None:
        config = self._config
        actor, ranks = ray.remote(Learner), config.learner.world_size
        settings = replace(
            config.learner, total_steps=config.learner.total_steps or config.optimizer_steps(config.ppo.steps)
        )
        self._meeting, warmup = rendezvous(config), config.ppo.critic_warmup_steps
        same = {
            "dtype": config.model.dtype,
            "seed": config.run.seed,
            "temperature": config.rollout.temperature,
            "critic_warmup": warmup,
            "policy_steps": config.policy_optimizer_steps,
        }
        self.ranks = [
            actor.options(**actor_options(config, "learner", ranks, rank)).remote(
                settings, rank, ranks, self._meeting, **same
            )
            for rank in range(ranks)
        ]
        self._ready = self._begin("setup", *self._models)

    def _deadline(self, call: PendingCall) -> HeartbeatDeadline:
        """The deadline of one call: learners send no heartbeats while they work."""
        faults = self._config.faults
        deadline = HeartbeatDeadline(max(faults.start_s, faults.silence_s), faults.silence_s)
        if call.method not in PATIENT:
            deadline.record_heartbeat()
        return deadline

    def _lost_rank(self, waiting: dict[Any, int]) -> LearnersLost | None:
        """The rank that died, if any: when one rank dies, the others merely fail in their collectives."""
        deadline = HeartbeatDeadline(GRACE, GRACE)
        left = dict(waiting)
        while left and (answer := first_ready(list(left), deadline.seconds_left())) is not None:
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
