"""Evaluation during training: the policy's greedy responses to a fixed slice of the held-out prompts."""

import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Metrics, Request, Reward, Row, Sample
from metaalign_rl.ppo.collector import Collector, submit
from metaalign_rl.ppo.prompt_sampler import encode_prompts
from metaalign_rl.ppo.weight_sync import WeightSync
from metaalign_rl.runtime.faults import StepInterrupted
from metaalign_rl.scoring.worker_pool import RewardPool


class HeldOutPrompts:
    """Up to `ppo.evaluate_rows` of the held-out rows, tokenized. A run always takes the same ones.

    Raises:
        UserError: a row does not fit in `model.max_tokens`.
    """

    def __init__(self, config: Config, rows: Sequence[Row], tokenizer: Any) -> None:
        if config.ppo.checks_weight > 0:  # other rows cannot be scored
            rows = [row for row in rows if row.tier in row.checks]
        count = min(config.ppo.evaluate_rows, len(rows))
        self.rows = random.Random(f"held out {config.run.seed}").sample(list(rows), count)
        self.ids = encode_prompts(config, self.rows, tokenizer)


class HeldOutEvaluation:
    """Evaluates the policy that the engines hold.

    Args:
        prompts: None, or without rows: no step is evaluated.
    """

    def __init__(
        self,
        config: Config,
        prompts: HeldOutPrompts | None,
        collector: Collector,
        scorers: RewardPool,
        weight_sync: WeightSync,
    ) -> None:
        self._config, self._prompts = config.ppo, prompts
        self._collector, self._scorers, self._weight_sync = collector, scorers, weight_sync
        # Greedy responses draw no random numbers, so an evaluation does not change the training.
        self._sampling = replace(config.rollout.sampling, temperature=0.0, top_p=1.0)

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps: every `ppo.evaluate_steps`, and after the last."""
        every = self._config.evaluate_steps
        if not every or self._prompts is None or not self._prompts.rows:
            return False
        return step % every == 0 or step >= self._config.steps

    def evaluate(self) -> Metrics:
        """The metrics of the responses: `held_out_reward`, `held_out_unfinished` and, if rows have checks,
        `held_out_gold`. Nothing else may use the engines meanwhile.

        Raises:
            UserError: a row cannot be scored.
            LearnersLost, StaleEngine, TooManyFaults.
        """
        assert self._prompts is not None
        samples = self._answers()
        self._collector.rest()  # a checkpoint may follow
        self._scorers.begin_step()
        rewards = self._scorers.result(submit(self._scorers, self._prompts.rows, samples))
        return _metrics(samples, rewards)

    def _answers(self) -> list[Sample]:
        assert self._prompts is not None
        requests = [Request(index, ids) for index, ids in enumerate(self._prompts.ids)]
        while True:
            try:
                found = [sample for part in self._collector.generate(requests, self._sampling) for sample in part]
            except StepInterrupted:
                self._weight_sync.repair()
            else:
                return sorted(found, key=lambda sample: sample.index)


def _metrics(samples: Sequence[Sample], rewards: Sequence[Reward]) -> Metrics:
    gold = [float(reward.gold) for reward in rewards if reward.gold is not None]
    metrics = {
        "held_out_reward": fmean(reward.value for reward in rewards),
        "held_out_unfinished": fmean(not sample.finished for sample in samples),
    }
    return metrics | ({"held_out_gold": fmean(gold)} if gold else {})


def score_of(metrics: Metrics) -> float | None:
    """The number by which checkpoints are compared: gold on the held-out rows, or without checks their mean reward."""
    return metrics.get("held_out_gold", metrics.get("held_out_reward"))
