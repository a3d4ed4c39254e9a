"""The PPO loop. It knows rows, samples, rewards and batches; the actors know devices."""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from metaalign_rl.config import Config
from metaalign_rl.data.flips import can_flip, swap
from metaalign_rl.files import read_json, replace_folder, write_json
from metaalign_rl.learner.advantages import token_kl
from metaalign_rl.learner.batch import Batch
from metaalign_rl.learner.group import LearnerGroup
from metaalign_rl.learner.kl import AdaptiveKL, FixedKL, KLController
from metaalign_rl.meta_prompt import MetaPrompt, encode
from metaalign_rl.ppo.experience import Rollout, add_advantages, roll_out, to_batch, worst_mismatch
from metaalign_rl.ppo.records import RolloutLog
from metaalign_rl.ppo.sampler import TierSampler
from metaalign_rl.refusals import is_refusal
from metaalign_rl.rollout.pool import EnginePool
from metaalign_rl.rollout.types import Sampling
from metaalign_rl.schema import Row
from metaalign_rl.weights.transfer import make_transfer

Metrics = dict[str, float]


@dataclass
class Actors:
    """Those who do the work: rollout engines, reward workers and learners, any number of each."""

    engines: EnginePool
    scorers: Sequence[Any]
    learners: LearnerGroup


class Controller:
    """Drives PPO step by step.

    Args:
        rows: what to roll out, with meta-prompts; answers are sampled, never read.
        checkpoints: where to save, and to continue from.
        log: keeps the rollouts.
    """

    def __init__(
        self, config: Config, actors: Actors, rows: Sequence[Row], tokenizer: Any, checkpoints: Path, log: RolloutLog
    ) -> None:
        conflicts = [index for index, row in enumerate(rows) if can_flip(row)] if config.ppo.flips else []
        flips = {index: len(rows) + place for place, index in enumerate(conflicts)}
        self.config, self.actors, self.tokenizer = config, actors, tokenizer
        self.rows = [*rows, *(swap(rows[index]) for index in conflicts)]
        self.sampler = TierSampler(rows, config.ppo.sampler, config.run.seed, flips)
        self.sampling = Sampling(max_new_tokens=config.rollout.max_new_tokens)
        self.kl = make_kl_controller(config)
        self.step = 0
        self._checkpoints, self._log = checkpoints, log
        self._transfer = make_transfer(config)

    def steps(self) -> Iterator[Metrics]:
        """Run the steps that are left; yields each one's metrics.

        Raises:
            UserError: a row's meta-prompt does not fit, or a row cannot be scored.
            StaleEngine: an engine drew answers from other weights than the learners'.
        """
        prompts = [self._encode(row) for row in self.rows]  # all now: one that does not fit must not end a long run
        self._resume()
        self._send_weights()
        while self.step < self.config.ppo.steps:
            yield self._step(prompts)
            if self.step % self.config.ppo.save_steps == 0 or self.step == self.config.ppo.steps:
                self._save()

    def _step(self, prompts: Sequence[list[int]]) -> Metrics:
        clock = Clock()
        indices = self.sampler.draw(self.step, self.config.ppo.prompts_per_step) * self.config.ppo.samples_per_prompt
        rows, asked = [self.rows[i] for i in indices], [prompts[i] for i in indices]
        rollouts = roll_out(self.actors.engines, self.actors.scorers, rows, asked, self.sampling)
        clock.lap("rollout")
        batch = self.actors.learners.evaluate(to_batch(rollouts, self.tokenizer.pad_token_id))
        clock.lap("evaluate")
        off = worst_mismatch(batch, rollouts, self.step, self.config.ppo.max_mismatch)
        add_advantages(batch, rollouts, self.config.ppo, self.kl.value)
        learned = self.actors.learners.train(batch)
        clock.lap("learn")
        self.step += 1
        self._send_weights()
        clock.lap("transfer")
        self._log.write(self.step, rollouts)
        described = describe(rollouts, batch)
        self.kl.update(described["kl"] * described["response_tokens"], len(rollouts))
        return {"step": self.step, **described, **learned, "mismatch": off, "kl_coef": self.kl.value, **clock.laps}

    def _encode(self, row: Row) -> list[int]:
        room = self.config.model.max_tokens - self.config.rollout.max_new_tokens
        meta = MetaPrompt(row.system_info, row.user_info)
        return encode(self.tokenizer, meta, row.messages, max_tokens=room, place=f"row {row.id!r}")

    def _send_weights(self) -> None:
        engines = dict(enumerate(self.actors.engines.engines))
        self._transfer.send(self.actors.learners.ranks, engines, self.step)

    def _save(self) -> None:
        def fill(folder: Path) -> None:
            self.actors.learners.save_state(folder / "learners")
            write_json(folder / "controller.json", {"step": self.step, "kl_coef": self.kl.value})

        old = list(self._checkpoints.glob("step-*"))
        replace_folder(self._checkpoints / f"step-{self.step}", fill)
        for folder in old:
            shutil.rmtree(folder)

    def _resume(self) -> None:
        saved = {int(folder.name.removeprefix("step-")): folder for folder in self._checkpoints.glob("step-*")}
        if saved:
            last = saved[max(saved)]
            state = read_json(last / "controller.json")
            self.step, self.kl.value = state["step"], state["kl_coef"]
            self.actors.learners.load_state(last / "learners")


class Clock:
    """Seconds between laps, as metrics."""

    def __init__(self) -> None:
        self.laps: Metrics = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Call the time since the last lap `seconds_NAME`."""
        now = time.monotonic()
        self.laps[f"seconds_{name}"] = now - self._last
        self._last = now


def make_kl_controller(config: Config) -> KLController:
    """The coefficient of the KL penalty, fixed or steered towards a target."""
    ppo = config.ppo
    return FixedKL(ppo.kl_coef) if ppo.kl == "fixed" else AdaptiveKL(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)


class Measured(NamedTuple):
    """A rollout with its sums over the answer's tokens: nats of KL, nats of surprisal, and how many they are."""

    rollout: Rollout
    kl: float
    surprisal: float
    tokens: float


def describe(rollouts: Sequence[Rollout], batch: Batch) -> Metrics:
    """What the step's answers are like, all together and by tier and relation.

    `reward`, `proxy`, `gold` and `refused` are means over the answers, `response_tokens` is the mean length; `kl` and
    `surprisal`, the mean of -log p of the drawn tokens and so an estimate of the entropy, are in nats a token.
    """
    assert batch.logprobs is not None and batch.ref_logprobs is not None
    kl = token_kl(batch.logprobs, batch.ref_logprobs, batch.action_mask)
    sums = (tensor.sum(dim=1).tolist() for tensor in (kl, -batch.logprobs, batch.action_mask))
    answers = [Measured(*found) for found in zip(rollouts, *sums, strict=True)]
    metrics = _means(answers, "")
    for name, key in (("tier", lambda r: r.row.tier), ("relation", lambda r: r.row.relation)):
        for value in sorted({key(rollout) for rollout in rollouts}):
            metrics |= _means([answer for answer in answers if key(answer.rollout) == value], f"{name}/{value}/")
    unfinished = fmean(not rollout.sample.finished for rollout in rollouts)
    return metrics | {"samples": len(rollouts), "unfinished": unfinished}


def _means(answers: Sequence[Measured], prefix: str) -> Metrics:
    rewards = [answer.rollout.reward for answer in answers]
    columns: dict[str, list[float]] = {
        "reward": [reward.value for reward in rewards],
        "proxy": [reward.proxy for reward in rewards if reward.proxy is not None],
        "gold": [float(reward.gold) for reward in rewards if reward.gold is not None],
        "refused": [float(is_refusal(answer.rollout.sample.text)) for answer in answers],
        "response_tokens": [answer.tokens for answer in answers],
    }
    means = {prefix + name: fmean(values) for name, values in columns.items() if values}
    tokens = sum(answer.tokens for answer in answers)
    sums = {"kl": sum(answer.kl for answer in answers), "surprisal": sum(answer.surprisal for answer in answers)}
    return means | {prefix + name: total / tokens for name, total in sums.items()}
