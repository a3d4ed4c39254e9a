"""The PPO loop: `PPOTrainer.step` is one step, in the order of the algorithm.

PromptSource ─> Prefetch ─> Collector ──> add_advantages ──> LearnerGroup ──> WeightSync ──> next step
rows            this step   generate,     rewards and KL     policy and       engines get
                or ahead    score,        to advantages      critic update    the weights
                            evaluate
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Batch, Metrics, Rollout
from metaalign_rl.core.errors import UserError
from metaalign_rl.learner.divergence import Diverged
from metaalign_rl.learner.group import LearnerGroup, PendingCall
from metaalign_rl.monitoring.rollout_table import RolloutWriter, save_experience
from metaalign_rl.ppo.advantages import add_advantages
from metaalign_rl.ppo.checkpoints import Checkpoints
from metaalign_rl.ppo.collector import Collector
from metaalign_rl.ppo.held_out import HeldOutEvaluation, HeldOutPrompts, score_of
from metaalign_rl.ppo.prefetch import Prefetch
from metaalign_rl.ppo.prompt_sampler import PromptSource
from metaalign_rl.ppo.recovery import Recovery
from metaalign_rl.ppo.selection import select
from metaalign_rl.ppo.step_metrics import rollout_metrics
from metaalign_rl.ppo.step_timer import StepTimer
from metaalign_rl.ppo.weight_sync import WeightSync
from metaalign_rl.rollout.engine_pool import EnginePool
from metaalign_rl.runtime import signals
from metaalign_rl.runtime.faults import FaultLog, LearnersLost
from metaalign_rl.scoring.worker_pool import RewardPool


@dataclass
class Actors:
    """The processes that do the work: rollout engines, reward workers and learners, any number of each."""

    engines: EnginePool
    scorers: RewardPool
    learners: LearnerGroup

    def stop(self) -> None:
        """Stop the reward workers and learners; the engines belong to the run."""
        self.learners.stop()
        self.scorers.stop()


class PPOTrainer:
    """Trains a policy with `ppo.algorithm`. It handles rows, rollouts and batches; the actors handle devices.

    Args:
        prompts: the rows to sample prompts from.
        pad_id: the tokenizer's padding token.
        checkpoints: the folder of checkpoints, to save and to resume from.
        rollout_writer: saves the rollouts.
        faults: counts actors that are lost.
        report: gets the metrics of each step. After a learner is lost, steps are repeated and reported again.
        held_out: the prompts to evaluate the policy on during training.
    """

    def __init__(
        self,
        config: Config,
        actors: Actors,
        prompts: PromptSource,
        pad_id: int,
        checkpoints: Path,
        rollout_writer: RolloutWriter,
        faults: FaultLog,
        report: Callable[[Metrics], None],
        held_out: HeldOutPrompts | None = None,
    ) -> None:
        engines, scorers, self.learners = actors.engines, actors.scorers, actors.learners
        self.config, self.rollout_writer, self.faults, self.report = config, rollout_writer, faults, report
        self.checkpoints = Checkpoints(checkpoints, config.ppo.keep_checkpoints)
        self.recovery = Recovery(config, self.learners, self.checkpoints, faults)
        self.weight_sync = WeightSync.of(config, self.learners, engines.actors)
        collector = Collector(config, prompts, engines, scorers, self.learners, self.weight_sync, pad_id)
        self.prefetch = Prefetch(config, collector, engines)
        self.evaluation = HeldOutEvaluation(config, held_out, collector, scorers, self.weight_sync)

    def train(self, policy: Path) -> None:
        """Run the remaining steps and save the policy in the folder `policy`.

        A signal to stop ends training after the update in progress, with a checkpoint.

        Raises:
            UserError: a row cannot be scored, or training diverged; the message names the saved batch.
            StaleEngine: an engine sampled from weights other than the learners'.
            TooManyFaults: actors were lost too often.
        """
        is_restored = is_saved = False
        try:
            while not is_saved:
                try:
                    if not is_restored:
                        self.recovery.restore()
                        self.weight_sync.push(version=self.recovery.step)
                        is_restored = True
                    elif self.recovery.step < self.config.ppo.steps:
                        self.step()
                    else:
                        self.learners.save_policy(policy)
                        is_saved = True
                except LearnersLost as lost:
                    self.recovery.stop_learners(lost)
                    self.prefetch.cancel()
                    is_restored = False
        except Diverged as error:
            raise UserError(error.args[0]) from error
        except KeyboardInterrupt:
            self.recovery.save_before_stopping()
            raise
        finally:
            self.prefetch.close()

    def step(self) -> None:
        """Run one PPO step."""
        step, kl, timer = self.recovery.step, self.recovery.kl, StepTimer()
        rollouts, batch, seconds = self.prefetch.next(step)  # generate, score, evaluate
        timer.add(seconds)
        with signals.defer_signals():  # a signal to stop waits for the end of the step
            mismatch = self._check_engines(batch, rollouts, step)
            learned, selected = select(rollouts, self.config.ppo)
            add_advantages(batch, rollouts, self.config.ppo, kl.value, learned)
            with timer.part("learn"):
                self.recovery.begin_update()
                kl_in_loss = kl.value if self.config.ppo.kl_in_loss else 0.0
                update = self.learners.begin_train(batch.select(learned), kl_in_loss)
                self.prefetch.start(step + 1)  # queued after the update, so the updated policy evaluates its batch
                self.rollout_writer.write(step + 1, rollouts)
                metrics = {"step": step + 1, **rollout_metrics(rollouts, batch, version=step), **selected}
                metrics |= mismatch | self._finish_update(update, step, rollouts, batch)
                metrics |= self._check_first_minibatch(batch, rollouts, learned, step)
            with timer.part("rollout"):
                self.prefetch.wait_unless_in_flight()
            self.recovery.finish_update()
            with timer.part("transfer"):
                self.weight_sync.push(version=step + 1)
            if self.evaluation.is_due(step + 1):
                with timer.part("evaluate"):
                    self.prefetch.wait()
                    metrics |= self.evaluation.evaluate()
            if step >= self.config.ppo.critic_warmup_steps:  # before, the policy does not move
                kl.update(metrics["kl"] * metrics["response_tokens"], len(rollouts))
            self.recovery.finish_step(metrics.get("gold"), score_of(metrics))
            faults = {"faults": self.faults.count, "reward_faults": self.faults.reward_worker_count}
            self.report({**metrics, "kl_coef": kl.value, **faults, **timer.metrics()})
            self.recovery.save_if_due()

    def _finish_update(self, update: PendingCall, step: int, rollouts: Sequence[Rollout], batch: Batch) -> Metrics:
        """Return the update's metrics. If the update diverged, save its batch."""
        try:
            metrics: Metrics = self.learners.result(update)
        except Diverged as error:
            kept = self.checkpoints.folder / f"diverged-step-{step + 1}"
            save_experience(kept, step + 1, rollouts, batch)
            raise UserError(f"{error.args[0]}; its batch is in {kept}") from error
        return metrics

    def _check_engines(self, batch: Batch, rollouts: Sequence[Rollout], step: int) -> Metrics:
        """The mismatch, if the batch has the learners' own log-probabilities."""
        guard = self.recovery.guard
        guard.check_versions(rollouts, step)
        return {} if self._trusts_engines(step) else {"mismatch": guard.check(batch, rollouts, step)}

    def _check_first_minibatch(
        self, batch: Batch, rollouts: Sequence[Rollout], learned: Sequence[int], step: int
    ) -> Metrics:
        """The mismatch, if only the update computes the learners' log-probabilities.

        Only those of the first minibatch are the policy's before the update. Without `learned` rollouts there are none.
        """
        if not self._trusts_engines(step) or not learned:
            return {}
        rows, logprobs = self.learners.call("first_logprobs")
        part = replace(batch.select(learned), logprobs=logprobs).select(rows)
        return {"mismatch": self.recovery.guard.check(part, [rollouts[learned[row]] for row in rows], step)}

    def _trusts_engines(self, step: int) -> bool:
        """Whether the batch has the engines' log-probabilities as the policy's; see `Learner.evaluate`."""
        return self.config.learner.old_logprobs == "engine" and step >= self.config.ppo.critic_warmup_steps
