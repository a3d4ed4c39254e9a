"""The PPO loop. It knows rows, samples, rewards and batches; the actors know devices."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Batch, Metrics, Rollout, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import encode_row
from metaalign_rl.data.flips import can_flip, swap
from metaalign_rl.learner.divergence import Diverged
from metaalign_rl.learner.group import LearnerGroup, PendingCall
from metaalign_rl.monitoring.rollout_table import RolloutWriter, save_experience
from metaalign_rl.ppo.advantages import add_advantages
from metaalign_rl.ppo.checkpoints import Checkpoint, Checkpoints
from metaalign_rl.ppo.collector import Collector, Experience, StepTimer, worst_mismatch
from metaalign_rl.ppo.kl_controller import AdaptiveKL, FixedKL, KLController
from metaalign_rl.ppo.prompt_sampler import PromptSampler
from metaalign_rl.ppo.step_metrics import describe
from metaalign_rl.ppo.weight_sync import make_transfer
from metaalign_rl.rollout.engine_pool import EnginePool
from metaalign_rl.runtime import signals
from metaalign_rl.runtime.faults import FaultLog, LearnersLost, StepInterrupted
from metaalign_rl.scoring.worker_pool import RewardPool
from metaalign_rl.weights import assert_fresh


@dataclass
class Actors:
    """Those who do the work: rollout engines, reward workers and learners, any number of each."""

    engines: EnginePool
    scorers: RewardPool
    learners: LearnerGroup

    def stop(self) -> None:
        """End the reward workers and learners; the engines belong to the run."""
        self.learners.stop()
        self.scorers.stop()


class PPOTrainer:
    """Drives PPO step by step.

    Args:
        rows: what to roll out, with meta-prompts; answers are sampled, never read.
        checkpoints: the folder to save in, and to continue from.
        log: keeps the rollouts.
        faults: counts what breaks.
    """

    def __init__(
        self,
        config: Config,
        actors: Actors,
        rows: Sequence[Row],
        tokenizer: Any,
        checkpoints: Path,
        log: RolloutWriter,
        faults: FaultLog,
    ) -> None:
        conflicts = [index for index, row in enumerate(rows) if can_flip(row)] if config.ppo.flips else []
        flips = {index: len(rows) + place for place, index in enumerate(conflicts)}
        self.config, self.actors, self.tokenizer = config, actors, tokenizer
        self.rows = [*rows, *(swap(rows[index]) for index in conflicts)]
        self.sampler = PromptSampler(rows, config.ppo.sampler, config.run.seed, flips)
        self.kl = make_kl_controller(config)
        self.step = 0
        self._collector = Collector(config, actors.engines, actors.scorers, actors.learners, tokenizer.pad_token_id)
        self._checkpoints = Checkpoints(checkpoints, config.ppo.keep_checkpoints)
        self._log, self._faults = log, faults
        self._transfer = make_transfer(config)
        self._gold: list[float] = []  # of each step since the last checkpoint
        self._ahead: Future[Experience] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self._is_unsaved = False  # the learners stand after a step that no checkpoint has
        self._has_warned = False

    def steps(self, policy: Path) -> Iterator[Metrics]:
        """Run the steps that are left and write the policy; yields each step's metrics, again where one was lost.

        A signal to stop (`stopping`) ends it with a checkpoint after the last update that had begun.

        Raises:
            UserError: a row's meta-prompt does not fit, or a row cannot be scored; or the training diverged, in which
                case the message says where the batch is.
            StaleEngine: an engine drew answers from other weights than the learners'.
            TooManyFaults: actors broke again and again.
        """
        prompts = [self._encode(row) for row in self.rows]  # all now: one that does not fit must not end a long run
        try:
            self.actors.learners.wait()
            self._resume()
        except LearnersLost as lost:
            self._restart(lost)
        is_saved = False
        try:
            while not is_saved:
                try:
                    if self.step < self.config.ppo.steps:
                        clock = StepTimer()
                        experience = self._experience(prompts)
                        clock.take(experience.seconds)
                        with signals.defer_signals():
                            yield self._learn(experience, prompts, clock)
                            self._save_sometimes()
                    else:
                        self.actors.learners.save_policy(policy)
                        is_saved = True
                except LearnersLost as lost:
                    self._restart(lost)
        except KeyboardInterrupt:
            self._save_before_stopping()
            raise
        finally:  # a thread that goes on would keep the process alive, and replace the engines that are stopped now
            self._abandon_rollouts()
            self._thread.shutdown()

    def _learn(self, experience: Experience, prompts: Sequence[list[int]], clock: StepTimer) -> Metrics:
        rollouts, batch, _ = experience
        ppo = self.config.ppo
        off = worst_mismatch(batch, rollouts, self.step, self.config.max_mismatch, ppo.staleness)
        add_advantages(batch, rollouts, ppo, self.kl.value)
        clock.lap("idle")
        self._is_unsaved = False  # nor is it a step's end, until the update is done
        update = self._begin_learning(batch, prompts)
        self._log.write(self.step + 1, rollouts)
        described = describe(rollouts, batch, version=self.step)
        learned = self._learnt(update, rollouts, batch)
        clock.lap("learn")
        self._let_rollouts_end()
        clock.lap("rollout")
        self.step += 1
        self._is_unsaved = True
        self._send_weights()
        clock.lap("transfer")
        self.kl.update(described["kl"] * described["response_tokens"], len(rollouts))
        self._gold += [described["gold"]] if "gold" in described else []
        self._faults.step_finished(self.step)
        clock.lap("idle")
        faults = {"faults": self._faults.count, "reward_faults": self._faults.reward_worker_count}
        known = {"kl_coef": self.kl.value, **faults}
        return {"step": self.step, **described, "mismatch": off, **learned, **known, **clock.metrics()}

    def _experience(self, prompts: Sequence[list[int]]) -> Experience:
        """The step's experience: what was rolled out ahead, for which this waits, or collected now."""
        if self._ahead is None:
            return self._collect(self.step, prompts)
        clock = StepTimer()
        rollouts, batch, _ = self._ahead.result()
        self._ahead = None
        clock.lap("rollout")
        return Experience(rollouts, batch, clock.laps)

    def _collect(self, step: int, prompts: Sequence[list[int]]) -> Experience:
        indices = self.sampler.draw(step, self.config.ppo.prompts_per_step)
        rows, asked = [self.rows[i] for i in indices], [prompts[i] for i in indices]
        while True:
            try:
                return self._collector.collect(step, rows, asked)
            except StepInterrupted:
                self.actors.engines.revive()

    def _begin_learning(self, batch: Batch, prompts: Sequence[list[int]]) -> PendingCall:
        update = self.actors.learners.begin_train(batch, self.kl.value if self.config.ppo.kl_in_loss else 0.0)
        self._roll_out_ahead(prompts)  # after the update in the learners' line: they judge answers as they are then
        return update

    def _learnt(self, update: PendingCall, rollouts: Sequence[Rollout], batch: Batch) -> Metrics:
        try:
            metrics: Metrics = self.actors.learners.result(update)
        except Diverged as error:
            kept = self._checkpoints.folder / f"diverged-step-{self.step + 1}"
            save_experience(kept, self.step + 1, rollouts, batch)
            raise UserError(f"{error.args[0]}; its batch is in {kept}") from error
        if "mismatch" in metrics and not self.config.ppo.staleness:  # told now, since no pass of its own told before
            assert_fresh(metrics["mismatch"], self.config.max_mismatch, self.step, "a rollout engine")
        return metrics

    def _roll_out_ahead(self, prompts: Sequence[list[int]]) -> None:
        """Where a step of staleness is allowed, roll the next step out while this one is learnt."""
        if self.config.ppo.staleness and self.step + 1 < self.config.ppo.steps:
            self._ahead = self._thread.submit(self._collect, self.step + 1, prompts)

    def _abandon_rollouts(self) -> None:
        """Let what is rolled out ahead come to an end without a result."""
        if self._ahead is not None:
            # Not simply waited for: engines pause for good where the learners died while they sent weights.
            with self.actors.engines.abandoned():
                wait([self._ahead])
            self._ahead = None

    def _let_rollouts_end(self) -> None:
        """Answers are drawn from one set of weights, unless they may take new ones in flight."""
        if self._ahead is not None and not self.config.ppo.in_flight:
            wait([self._ahead])

    def _encode(self, row: Row) -> list[int]:
        room = self.config.model.max_tokens - self.config.rollout.max_new_tokens
        return encode_row(self.tokenizer, row, max_tokens=room)

    def _send_weights(self) -> None:
        version = self.step
        self.actors.engines.load(lambda engines: self._transfer.send(self.actors.learners, engines, version))

    def _save_sometimes(self) -> None:
        if self.step % self.config.ppo.save_steps and self.step < self.config.ppo.steps:
            return
        self._save()

    def _save(self) -> None:
        began = time.monotonic()
        gold = fmean(self._gold) if self._gold else None
        self._checkpoints.save({"step": self.step, "kl_coef": self.kl.value, "gold": gold}, self._save_learners)
        self._gold, self._is_unsaved = [], False
        self._has_warned = self._has_warned or signals.warn_if_stop_kills_save(time.monotonic() - began)

    def _save_before_stopping(self) -> None:
        if self._is_unsaved:
            with suppress(LearnersLost):
                self._save()
        last = self._checkpoints.last()
        print(f"ppo: stopped; what is saved is step {last.state['step'] if last else 0}", flush=True)

    def _save_learners(self, checkpoint: Checkpoint) -> None:
        self.actors.learners.save_state(checkpoint.learners)
        self.actors.learners.save_policy(checkpoint.policy)

    def _resume(self) -> None:
        """Take up the last checkpoint, or stand at the start where there is none."""
        self.step, self._gold, self.kl, self._is_unsaved = 0, [], make_kl_controller(self.config), False
        if last := self._checkpoints.last():
            self.actors.learners.load_state(last.learners)
            self.step, self.kl.value = last.state["step"], last.state["kl_coef"]
        self._faults.step = self.step
        self._send_weights()

    def _restart(self, lost: LearnersLost) -> None:
        """Start the learners again from the last checkpoint, as often as `faults.limit` allows."""
        while True:
            self._is_unsaved = False
            self._faults.record(lost, "all ranks start again from the last checkpoint")
            self.actors.learners.stop()
            self._abandon_rollouts()
            try:
                self.actors.learners.restart()
                self._resume()
                return
            except LearnersLost as again:
                lost = again


def make_kl_controller(config: Config) -> KLController:
    """The coefficient of the KL penalty, fixed or steered towards a target."""
    ppo = config.ppo
    return FixedKL(ppo.kl_coef) if ppo.kl == "fixed" else AdaptiveKL(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
