"""PPO: which responses enter the loss, how they are sampled, and the evaluation on held-out prompts."""

from dataclasses import replace

import pytest

from metaalign_rl.config.schema import Config, PPOConfig, RolloutConfig
from metaalign_rl.core.chat_template import install
from metaalign_rl.core.dataflow import Reward, Rollout, Sample
from metaalign_rl.core.errors import UserError
from metaalign_rl.data.world import build
from metaalign_rl.data.world.tokenizer import build_tokenizer
from metaalign_rl.ppo.held_out import HeldOutEvaluation, HeldOutPrompts, score_of
from metaalign_rl.ppo.selection import select
from metaalign_rl.runtime.faults import StepInterrupted


@pytest.fixture(scope="module")
def rows():
    return build.prompts(0, 600)


# Which responses enter the loss.


def ended(row, value, finished=True):
    sample = Sample(0, [1], [2], [-0.1], "x", finished=finished, weight_version=0)
    return Rollout(row, sample, Reward(value, value, None))


def test_by_default_every_response_enters_the_loss(rows):
    rollouts = [ended(rows[0], 0.5), ended(rows[0], 0.5, finished=False)]
    assert select(rollouts, PPOConfig()) == ([0, 1], {})


def test_truncated_responses_can_be_left_out(rows):
    rollouts = [ended(rows[0], 0.5), ended(rows[0], 0.5, finished=False), ended(rows[1], 0.1)]
    assert select(rollouts, PPOConfig(unfinished="mask")) == ([0, 2], {})


def test_prompts_whose_responses_all_score_the_same_can_be_left_out(rows):
    values = [(0, 0.5), (1, 0.2), (0, 0.5), (1, 0.3), (2, 1.0), (2, 1.0)]
    rollouts = [ended(rows[row], value) for row, value in values]
    learned, metrics = select(rollouts, PPOConfig(algorithm="rloo", skip_equal_groups=True))
    assert learned == [1, 3]
    assert metrics == {"skipped_groups": pytest.approx(2 / 3)}


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce++"])
def test_only_algorithms_that_compare_a_prompt_s_responses_may_skip_prompts(algorithm):
    with pytest.raises(UserError, match="ppo.algorithm: expected rloo or grpo with ppo.skip_equal_groups=true"):
        PPOConfig(algorithm=algorithm, skip_equal_groups=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate_steps": 3, "save_steps": 20}, "ppo.evaluate_steps: expected 0, or a divisor of ppo.save_steps=20"),
        ({"reward_clip": (1.0, -1.0)}, "ppo.reward_clip: expected two numbers, the second one larger"),
        ({"critic_warmup_steps": 60}, "ppo.critic_warmup_steps: expected less than ppo.steps=60"),
        (
            {"critic_warmup_steps": 1, "algorithm": "rloo"},
            "ppo.critic_warmup_steps: expected 0 with ppo.algorithm=rloo",
        ),
        ({"unfinished": "drop"}, "ppo.unfinished: expected one of none, penalty, mask"),
    ],
)
def test_a_meaningless_setting_of_ppo_is_an_error(changes, message):
    with pytest.raises(UserError, match=message):
        PPOConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "rollout.temperature: expected a number above 0"),
        ({"temperature": 0.7, "top_p": 0.9}, "rollout.temperature: expected 1 with rollout.top_p below 1 or"),
        ({"temperature": 0.7, "min_new_tokens": 2}, "rollout.temperature: expected 1 with rollout.top_p below 1 or"),
        ({"top_p": 1.5}, "rollout.top_p: expected a share of at most 1"),
        ({"stop": ["\n", ""]}, "rollout.stop: expected texts that are not empty"),
        ({"min_new_tokens": 32}, "rollout.min_new_tokens: expected less than rollout.max_new_tokens=32"),
    ],
)
def test_sampling_that_falsifies_log_probabilities_is_an_error(changes, message):
    with pytest.raises(UserError, match=message):
        RolloutConfig(**changes)


def test_an_overlong_buffer_fits_into_a_response():
    with pytest.raises(UserError, match="ppo.overlong_tokens: expected at most rollout.max_new_tokens=32, found 33"):
        Config(ppo=PPOConfig(overlong_tokens=33))


# Evaluation during training.


class Answers:
    """A collector and reward workers: a prompt's response is its number of tokens, which is also its reward."""

    def __init__(self):
        self.sampling, self.lost, self.rests = None, 1, 0

    def generate(self, requests, sampling):
        self.sampling = sampling
        if self.lost:
            self.lost -= 1
            raise StepInterrupted("an engine is lost")
        for request in reversed(requests):
            length = len(request.prompt_ids)
            yield [Sample(request.index, request.prompt_ids, [2], [-0.1], str(length), length % 2 == 0, 0)]

    def repair(self):
        pass

    def rest(self):
        self.rests += 1

    def begin_step(self):
        pass

    def submit(self, rows, responses, endings):
        return zip(rows, responses, strict=True)

    def result(self, pending):
        return [Reward(float(text), None, None if row.id == "plain" else row.tier == "system") for row, text in pending]


def evaluation(rows, **changes):
    config = Config(ppo=PPOConfig(steps=7, evaluate_steps=2, **changes), rollout=RolloutConfig(temperature=0.8))
    tokenizer = build_tokenizer(row.system_info for row in rows)
    install(tokenizer)
    prompts, fake = HeldOutPrompts(config, rows, tokenizer), Answers()
    return HeldOutEvaluation(config, prompts, fake, fake, fake), prompts, fake


def test_the_held_out_prompts_are_answered_greedily_and_a_lost_engine_does_not_matter(rows):
    found, prompts, fake = evaluation(rows, evaluate_rows=40)
    metrics = found.evaluate()
    lengths = [len(ids) for ids in prompts.ids]
    assert metrics["held_out_reward"] == pytest.approx(sum(lengths) / 40)
    assert metrics["held_out_unfinished"] == sum(length % 2 for length in lengths) / 40
    assert metrics["held_out_gold"] == sum(row.tier == "system" for row in prompts.rows) / 40
    assert score_of(metrics) == metrics["held_out_gold"]
    assert (fake.sampling.temperature, fake.sampling.max_new_tokens) == (0.0, 32)
    assert fake.rests == 1


def test_without_checks_the_reward_decides(rows):
    plain = [replace(row, id="plain", checks={}) for row in rows[:5]]
    metrics = evaluation(plain)[0].evaluate()
    assert "held_out_gold" not in metrics
    assert score_of(metrics) == metrics["held_out_reward"]


def test_an_evaluation_is_due_every_n_steps_and_after_the_last(rows):
    assert [step for step in range(1, 8) if evaluation(rows)[0].is_due(step)] == [2, 4, 6, 7]
    fake = Answers()
    assert not HeldOutEvaluation(Config(), None, fake, fake, fake).is_due(60)


def test_the_held_out_prompts_are_always_the_same(rows):
    first, second = (evaluation(rows, evaluate_rows=10)[1].rows for _ in range(2))
    assert first == second and len({row.id for row in first}) == 10


def test_with_checks_in_the_reward_only_rows_with_checks_are_evaluated(rows):
    bare = [replace(row, checks={}) if index % 2 else row for index, row in enumerate(rows[:20])]
    chosen = evaluation(bare, checks_weight=1.0)[1].rows
    assert chosen and all(row.tier in row.checks for row in chosen)
