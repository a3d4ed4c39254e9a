"""All learner ranks of a run as one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from metaalign_rl.config import Config
from metaalign_rl.learner.batch import Batch
from metaalign_rl.learner.worker import Learner
from metaalign_rl.ranks import rendezvous
from metaalign_rl.runtime import actor_options


class LearnerGroup:
    """The learners, one Ray actor a rank. Every call goes to all ranks; rank 0's answer is the group's."""

    def __init__(self, config: Config, policy: Path, critic: Path | None, reference: Path) -> None:
        """Start the ranks; they load their models while the caller goes on."""
        ranks = config.learners
        actor = ray.remote(Learner)
        config.learner.check_dtype(config.model.dtype)
        settings = replace(config.learner, total_steps=config.learner.total_steps or optimizer_steps(config))
        self._meeting, same = rendezvous(config), {"dtype": config.model.dtype, "seed": config.run.seed}
        self.ranks = [
            actor.options(**actor_options(config, "learner", ranks, rank)).remote(
                settings, rank, ranks, self._meeting, **same
            )
            for rank in range(ranks)
        ]
        self._ready = [rank.setup.remote(policy, critic, reference) for rank in self.ranks]

    def wait(self) -> None:
        """Return once all models are loaded."""
        ray.get(self._ready)

    def evaluate(self, batch: Batch) -> Batch:
        """The batch with log-probabilities of policy and reference, and values; see `Learner.evaluate`."""
        return self._call("evaluate", ray.put(batch))

    def train(self, batch: Batch) -> dict[str, float]:
        """One PPO update; see `Learner.train`."""
        return self._call("train", ray.put(batch))

    def save_policy(self, path: Path) -> None:
        """Write the policy as a Hugging Face checkpoint."""
        self._call("save_policy", path)

    def save_state(self, path: Path) -> None:
        """Write all that the next update depends on."""
        self._call("save_state", path)

    def load_state(self, path: Path) -> None:
        """Take up what `save_state` wrote."""
        self._call("load_state", path)

    def stop(self) -> None:
        """End the ranks' processes; where they met they may meet again until then."""
        for rank in self.ranks:
            ray.kill(rank)
        Path(self._meeting.removeprefix("file://")).unlink(missing_ok=True)

    def _call(self, method: str, *arguments: Any) -> Any:
        return ray.get([getattr(rank, method).remote(*arguments) for rank in self.ranks])[0]


def optimizer_steps(config: Config) -> int:
    """The optimizer steps of a whole PPO run."""
    minibatches = -(-config.ppo.prompts_per_step * config.ppo.samples_per_prompt // config.learner.minibatch_size)
    return config.ppo.steps * config.learner.epochs * minibatches
