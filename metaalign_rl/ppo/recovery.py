"""Resumes a run from its newest checkpoint after a stop, a crash or a lost learner."""

import time
from statistics import fmean

from metaalign_rl.config.schema import Config
from metaalign_rl.learner.divergence import Diverged
from metaalign_rl.learner.group import LearnerGroup
from metaalign_rl.ppo.checkpoints import Checkpoint, Checkpoints
from metaalign_rl.ppo.kl_controller import KLController
from metaalign_rl.ppo.mismatch import MismatchGuard
from metaalign_rl.runtime import signals
from metaalign_rl.runtime.faults import FaultLog, LearnersLost


class Recovery:
    """The trainer's state, and its checkpoints.

    Attributes:
        step: updates that the learners have finished; also the version of their weights.
        kl: the KL controller.
        guard: stops the run when an engine has other weights.
    """

    def __init__(self, config: Config, learners: LearnerGroup, checkpoints: Checkpoints, faults: FaultLog) -> None:
        self.step, self.kl, self.guard = 0, KLController.of(config.ppo), MismatchGuard(config)
        self._config, self._learners, self._checkpoints, self._faults = config, learners, checkpoints, faults
        self._gold: list[float] = []  # one per step since the newest checkpoint
        self._held_out: float | None = None  # result of the evaluation after this step
        self._can_save = False  # the learners are between two updates, and ahead of the newest checkpoint
        self._has_warned = False

    def restore(self) -> None:
        """Start the learners if they do not run, and load the newest checkpoint; without one, begin at step 0.

        Raises:
            LearnersLost: a rank died or hangs.
        """
        self._learners.start()
        self.step, self.kl, self._gold, self._can_save = 0, KLController.of(self._config.ppo), [], False
        self.guard = MismatchGuard(self._config)
        if newest := self._checkpoints.last():
            self._learners.load_state(newest.learners)
            self.step, self.kl.value = newest.state["step"], newest.state["kl_coef"]
            # Without a baseline, the next step measures it: the engines are about to get the learners' weights.
            self.guard.baseline = newest.state.get("mismatch_baseline")
        self._faults.step = self.step

    def stop_learners(self, lost: LearnersLost) -> None:
        """Stop what is left of the learners; `restore` starts them again.

        Raises:
            TooManyFaults: learners were lost too often.
        """
        self._can_save = False
        self._faults.record(lost, "all ranks start again from the last checkpoint")
        self._learners.stop()

    def begin_update(self) -> None:
        """Mid-update, there is no consistent state to save."""
        self._can_save = False

    def finish_update(self) -> None:
        """Count the update."""
        self.step += 1
        self._can_save, self._held_out = True, None

    def finish_step(self, gold: float | None, held_out: float | None) -> None:
        """The engines have the new weights.

        Args:
            gold: share of the step's rollouts that pass their checks.
            held_out: result of the evaluation after this step, if there was one; see `held_out.score_of`.
        """
        if gold is not None:
            self._gold.append(gold)
        self._held_out = held_out
        self._faults.step_finished(self.step)

    def save_if_due(self) -> None:
        """Write a checkpoint every `ppo.save_steps` steps, and after the last one."""
        if self.step % self._config.ppo.save_steps == 0 or self.step >= self._config.ppo.steps:
            self._save()

    def save_before_stopping(self) -> None:
        """Write a checkpoint if there is something to save, and print which step is saved."""
        if self._can_save:
            try:
                self._save()
            except (LearnersLost, Diverged) as lost:
                print(f"ppo: the last steps are not saved: {lost}", flush=True)
        newest = self._checkpoints.last()
        print(f"ppo: stopped; the newest checkpoint is of step {newest.state['step'] if newest else 0}", flush=True)

    def _save(self) -> None:
        began = time.monotonic()
        gold = fmean(self._gold) if self._gold else None
        state = {"step": self.step, "kl_coef": self.kl.value, "gold": gold, "held_out": self._held_out}
        state["mismatch_baseline"] = self.guard.baseline
        self._checkpoints.save(state, self._save_learners)
        self._gold, self._can_save = [], False
        self._has_warned = self._has_warned or signals.warn_if_stop_kills_save(time.monotonic() - began)

    def _save_learners(self, checkpoint: Checkpoint) -> None:
        self._learners.save_state(checkpoint.learners)
        self._learners.save_policy(checkpoint.policy)
