"""The parts of the PPO loop that run in the controller: prompts, rewards, chunks, checkpoints."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.schema import ClusterConfig, Config, PPOConfig, RolloutConfig
from metaalign_rl.core import meta_prompt
from metaalign_rl.core.dataflow import Reward, Rollout, Sample
from metaalign_rl.core.errors import UserError
from metaalign_rl.data.flips import MARK
from metaalign_rl.data.world import build
from metaalign_rl.data.world.tokenizer import build_tokenizer
from metaalign_rl.monitoring.rollout_table import RolloutWriter, read_rollouts
from metaalign_rl.ppo.advantages import scores_of
from metaalign_rl.ppo.checkpoints import Checkpoints
from metaalign_rl.ppo.collector import chunked, complete_groups, in_order
from metaalign_rl.ppo.kl_controller import KLController
from metaalign_rl.ppo.prompt_sampler import PromptSampler, PromptSource
from metaalign_rl.preflight.run import preflight
from metaalign_rl.runtime.placement import actor_resources
from metaalign_rl.scoring.terms import RewardSpec
from metaalign_rl.scoring.worker import RewardWorker


@pytest.fixture(scope="module")
def rows():
    return build.prompts(0, 600)


def test_without_weights_every_row_is_equally_likely(rows):
    sampler = PromptSampler(rows, {}, seed=0)
    drawn = Counter(rows[i].relation for step in range(40) for i in sampler.draw(step, 100))
    there = Counter(row.relation for row in rows)
    for relation, count in there.items():
        assert drawn[relation] / 4000 == pytest.approx(count / len(rows), abs=0.03)


def test_a_tiers_weight_is_its_share_of_the_draws(rows):
    sampler = PromptSampler(rows, {"system": 3.0, "user": 1.0}, seed=0)
    drawn = Counter(rows[i].tier for step in range(40) for i in sampler.draw(step, 100))
    assert set(drawn) == {"system", "user"}
    assert drawn["system"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_a_relation_s_weight_overrides_its_tier_s(rows):
    sampler = PromptSampler(rows, {"system/conflict": 1.0}, seed=0)
    assert {rows[i].relation for i in sampler.draw(0, 50)} == {"conflict"}


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 9),
    count=st.integers(1, 300),
    steps=st.integers(1, 12),
    weights=st.sampled_from([{}, {"system": 1.0}, {"system/conflict": 3.0, "user": 1.0}]),
)
def test_every_row_of_a_group_is_drawn_once_before_any_a_second_time(rows, seed, count, steps, weights):
    sampler = PromptSampler(rows, weights, seed)
    drawn = Counter(i for step in range(steps) for i in sampler.draw(step, count))
    assert sum(drawn.values()) == steps * count
    groups = {f"{row.tier}/{row.relation}" for row in rows} if weights else {""}
    for group in groups:
        times = [drawn[i] for i, row in enumerate(rows) if f"{row.tier}/{row.relation}".startswith(group)]
        assert max(times) - min(times) <= 1


def test_passes_come_in_different_orders(rows):
    sampler = PromptSampler(rows, {}, seed=0)
    first, second = ([i for step in steps for i in sampler.draw(step, 100)] for steps in (range(6), range(6, 12)))
    assert sorted(first) == sorted(second) == list(range(600))
    assert first != second


def test_a_resumed_run_draws_the_same_rows_without_the_steps_before(rows):
    for weights in ({}, {"system": 2.0, "user/conflict": 1.0}):
        whole = PromptSampler(rows, weights, seed=3)
        steps = [whole.draw(step, 90) for step in range(20)]
        assert PromptSampler(rows, weights, seed=3).draw(19, 90) == steps[19]
        assert whole.draw(4, 90) == steps[4]  # a repeated step


def test_only_groups_with_a_weight_are_drawn(rows):
    sampler = PromptSampler(rows, {"system": 2.0}, seed=0)
    assert {rows[i].tier for step in range(10) for i in sampler.draw(step, 100)} == {"system"}


def test_a_step_always_draws_the_same_rows_and_the_next_step_others(rows):
    sampler, again = PromptSampler(rows, {}, seed=0), PromptSampler(rows, {}, seed=0)
    assert sampler.draw(3, 20) == again.draw(3, 20) != sampler.draw(4, 20)


def test_a_step_draws_no_row_twice_if_there_are_enough(rows):
    drawn = PromptSampler(rows, {}, seed=0).draw(0, 200)
    assert len(set(drawn)) == 200


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"sistem": 1.0}, "did you mean 'system'"), ({"dialog/conflict": 1.0}, "no row is left to draw")],
)
def test_a_weight_of_an_unknown_group_is_an_error_that_names_it(rows, weights, message):
    with pytest.raises(UserError, match=message):
        PromptSampler(rows, weights, seed=0)


def test_both_sides_of_a_flip_are_in_the_same_step(rows):
    flips = {index: 10_000 + index for index, row in enumerate(rows) if row.relation == "conflict"}
    plain, flipped = (PromptSampler(rows, {}, seed=0, flips=f).draw(0, 200) for f in ({}, flips))
    assert len(flipped) == len(plain) == 200
    others = [index - 10_000 for index in flipped if index >= 10_000]
    assert others and set(others) <= set(flipped)
    conflicts = [index for index in plain if index in flips]
    assert len(others) == len(conflicts) // 2
    assert [i for i in sorted(flipped) if i not in flips and i < 10_000] == sorted(set(plain) - set(conflicts))


def test_a_conflict_is_rolled_out_together_with_its_flip(rows):
    source = PromptSource(Config(ppo=PPOConfig(flips=True, prompts_per_step=200)), rows, tokenizer_of(rows))
    drawn = {row.id: row for row in source.draw(0)[0]}
    flipped = [row for row in drawn.values() if row.id.endswith(MARK)]
    assert flipped
    for row in flipped:
        other = drawn[row.id.removesuffix(MARK)]
        assert (row.system_info, row.user_info) == (other.user_info, other.system_info)


def test_the_checks_alone_can_be_the_reward(rows):
    worker = RewardWorker(RewardSpec(mode="tier", checks_weight=1.0))
    (reward,) = worker.score(rows[:1], ["please please"])
    assert (reward.value, reward.proxy, reward.gold) == (0.0, None, False)
    assert reward.passes["dialog"] is False
    assert reward.probabilities == {}


def test_a_reward_without_a_term_is_an_error():
    with pytest.raises(UserError, match="all 0"):
        RewardWorker(RewardSpec(mode="tier"))
    with pytest.raises(UserError, match="no reward model"):
        RewardWorker(RewardSpec(mode="tier", model_weight=1.0))


def test_a_row_without_checks_cannot_be_rewarded_by_checks(rows):
    row = next(row for row in rows if row.tier == "system")
    for checks in ({}, {"dialog": row.checks["dialog"]}):
        with pytest.raises(UserError, match=r"checks\.system has none"):
            RewardWorker(RewardSpec(mode="tier", checks_weight=1.0)).score(
                [replace(row, checks=checks)], ["it is paris."]
            )


def test_rewards_can_be_normalized_per_tier_with_a_floor_on_the_deviation(rows):
    tiers = [next(row for row in rows if row.tier == tier) for tier in ("system", "user")]
    values = [0.0, 1.0, 0.90, 0.91]  # the user's tier is solved: its deviation is below the floor
    rollouts = [_rollout(tiers[i // 2], value) for i, value in enumerate(values)]
    assert scores_of(rollouts, False).tolist() == pytest.approx(values)
    assert scores_of(rollouts, True).tolist() == pytest.approx([-1, 1, -0.05, 0.05], abs=1e-4)


@pytest.mark.parametrize(
    ("learner", "layout", "message"),
    [
        ("off", "disaggregated", "learner.correction: .* with ppo.staleness=1"),
        ("token", "colocated", "cluster.layout: "),
    ],
)
def test_staleness_needs_correction_and_separate_devices(learner, layout, message):
    with pytest.raises(UserError, match=message):
        Config(
            ppo=PPOConfig(staleness=1),
            learner=LearnerConfig(correction=learner),
            cluster=ClusterConfig(layout=layout),
        )


def test_the_settings_choose_the_kl_controller():
    assert KLController.of(PPOConfig(kl_coef=0.2)) == KLController(0.2)
    adaptive = PPOConfig(kl="adaptive", kl_coef=0.2, kl_target=6.0, kl_horizon=1000)
    assert KLController.of(adaptive) == KLController(0.2, target=6.0, horizon=1000)


@pytest.mark.parametrize(
    ("gpus", "learners", "engines", "missing"),
    [
        (0, 2, 2, []),
        (1, 1, 1, []),
        (1, 2, 1, ["2 GPUs"]),
        (3, 1, 1, []),
        (4, 2, 2, ["5 GPUs"]),
    ],
)
def test_actors_share_one_gpu_or_have_one_each(gpus, learners, engines, missing):
    devices = ClusterConfig(gpus=gpus)
    config = Config(learner=LearnerConfig(world_size=learners), cluster=devices, rollout=RolloutConfig(engines=engines))
    checks = preflight(config)
    needed = [check.needed.partition(" (")[0] for check in checks if check.name == "cluster.gpus" and not check.ok]
    assert needed == missing
    counts = {"learner": learners, "rollout": engines, "reward": 3}
    if not missing:
        assert sum(n * actor_resources(config, role, n)["num_gpus"] for role, n in counts.items()) <= gpus


def test_kept_rollouts_are_read_by_step_and_a_repeated_step_replaces_its_own(rows, tmp_path):
    log = RolloutWriter(tmp_path / "rollouts", every=2)
    for step, value in ((1, 0.1), (2, 0.2), (4, 0.4), (4, 0.5)):
        log.write(step, [_rollout(row, value) for row in rows[:3]])
    kept = read_rollouts(tmp_path / "rollouts").to_pylist()
    assert [(line["step"], round(line["reward"], 3)) for line in kept] == [(2, 0.2)] * 3 + [(4, 0.5)] * 3
    assert [line["row"] for line in kept[:3]] == [row.id for row in rows[:3]]
    assert json.loads(kept[0]["messages"]) == rows[0].messages
    assert kept[0]["gold"] is None
    assert len(list((tmp_path / "rollouts").iterdir())) == 2  # no half-written file


def test_the_newest_checkpoints_are_kept_and_the_best_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, gold in ((1, 0.3), (2, 0.9), (3, 0.5), (4, None), (5, 0.6)):
        checkpoints.save({"step": step, "gold": gold}, lambda checkpoint: checkpoint.policy.mkdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4", "step-5"]
    assert checkpoints.best().policy == tmp_path / "step-2" / "policy"
    assert checkpoints.last().state == {"step": 5, "gold": 0.6}


def test_the_best_checkpoint_is_the_best_on_held_out_prompts_if_any_was_evaluated(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, gold, held_out in ((1, 0.9, 0.2), (2, 0.3, 0.6), (3, 0.5, 0.6), (4, 0.99, None), (5, 0.4, 0.1)):
        state = {"step": step, "gold": gold, "held_out": held_out}
        checkpoints.save(state, lambda checkpoint: checkpoint.policy.mkdir())
    assert checkpoints.best().state["step"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-5"]


def test_an_incomplete_checkpoint_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save({"step": 1, "gold": None}, lambda checkpoint: checkpoint.policy.mkdir())
    with pytest.raises(OSError, match="the process died"):
        checkpoints.save({"step": 2, "gold": None}, _die)
    assert checkpoints.last().state["step"] == 1
    assert checkpoints.best() is None


def test_the_next_checkpoint_removes_leftovers_of_dead_writers(tmp_path):
    """One was removing an old checkpoint, one was writing a new one."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    for name in (".step-1.123.old", ".step-6.124.part"):
        (tmp_path / name / "learners").mkdir(parents=True)
    checkpoints.save({"step": 10, "gold": 0.5}, lambda checkpoint: checkpoint.policy.mkdir())
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]


def _die(folder):
    raise OSError("the process died")


def _sample(index):
    return Sample(index, [1], [2], [-0.1], "x", finished=True, weight_version=0)


def _indices(samples):
    return [sample.index for sample in samples]


def test_samples_are_passed_on_in_complete_groups_and_chunks():
    finished = [[_sample(4)], [_sample(0), _sample(5)], [_sample(3), _sample(1)], [_sample(2)]]
    arrivals = list(complete_groups(finished, copies=2))
    assert [[_indices(group) for group in groups] for groups in arrivals] == [[], [[4, 5]], [[0, 1]], [[2, 3]]]
    assert [_indices(part) for part in chunked(arrivals, 4)] == [[4, 5, 0, 1], [2, 3]]
    assert [[_indices(group) for group in groups] for groups in in_order(arrivals, 2)] == [[[0, 1]], [[2, 3]], [[4, 5]]]


def test_samples_that_arrive_together_stay_in_one_chunk():
    arrivals = complete_groups([[_sample(index) for index in range(6)]], copies=2)
    assert [_indices(part) for part in chunked(arrivals, 2)] == [[0, 1, 2, 3, 4, 5]]


def test_a_run_may_keep_no_rollouts(rows, tmp_path):
    RolloutWriter(tmp_path / "rollouts", every=0).write(1, [_rollout(rows[0], 0.0)])
    assert read_rollouts(tmp_path / "rollouts").num_rows == 0
    assert not (tmp_path / "rollouts").exists()


def _rollout(row, value):
    sample = Sample(0, [1], [2], [-0.1], "x", finished=True, weight_version=0)
    return Rollout(row, sample, Reward(value, value, None))


def test_a_meta_prompt_that_does_not_fit_is_an_error_before_training(rows):
    long = replace(rows[5], id="long", system_info="please be formal. " * 200)
    with pytest.raises(UserError, match="row 'long'"):
        PromptSource(Config(), [rows[0], long], tokenizer_of(rows))


def tokenizer_of(rows):
    tokenizer = build_tokenizer(row.system_info for row in rows)
    meta_prompt.install(tokenizer)
    return tokenizer
