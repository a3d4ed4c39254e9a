"""The reward stage: rows from the SFT policy's responses, the training settings, and several devices."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from reward_toys import color_pairs, language_model

from metaalign_rl.config.schema import ClusterConfig, Config, ModelConfig, RewardConfig, RunConfig
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json, write_jsonl
from metaalign_rl.pipeline.context import RunContext
from metaalign_rl.pipeline.stages import reward as stage
from metaalign_rl.pipeline.stages.reward import label_answers, training_settings
from metaalign_rl.runtime.progress import in_thread
from reward.training.config import RewardTraining

ROW = Row(
    id="row",
    family="helpful",
    relation="system_only",
    tier="system",
    system_info="always write in capitals.",
    user_info="",
    messages=[{"role": "user", "content": "what is the capital of france?"}],
    checks={
        "system": {"name": "world.case", "value": "upper"},
        "dialog": {"name": "world.answers", "value": "paris"},
    },
)


def test_each_bad_response_makes_a_pair_with_a_good_one() -> None:
    rows = list(label_answers(ROW, ["IT IS PARIS.", "it is paris.", "PARIS.", "IT IS ROME.", "it is rome."]))
    assert [(row.chosen, row.rejected) for row in rows] == [
        ("IT IS PARIS.", "it is paris."),
        ("PARIS.", "IT IS ROME."),
        ("IT IS PARIS.", "it is rome."),
    ]
    assert len({row.id for row in rows}) == 3
    assert rows[1].labels["rejected"] == {"system": True, "dialog": False, "overall": False}


def test_responses_that_are_all_good_or_all_bad_become_labelled_responses() -> None:
    rows = list(label_answers(ROW, ["IT IS PARIS.", "PARIS."]))
    assert [(row.response, row.labels["response"]["overall"]) for row in rows] == [
        ("IT IS PARIS.", True),
        ("PARIS.", True),
    ]
    assert not any(row.chosen for row in rows)


def test_responses_that_differ_only_in_outer_white_space_are_merged() -> None:
    """The template strips them, so the reward model could not distinguish them."""
    assert [row.response for row in label_answers(ROW, ["it is rome.", "\x1f it is rome."])] == ["it is rome."]


def test_in_thread_returns_the_result_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())  # some of these may end during the test
    assert in_thread(lambda: threading.current_thread() is not threading.main_thread())
    assert set(threading.enumerate()) <= before


def test_the_trainer_gets_the_settings_of_the_run() -> None:
    reward = RewardConfig(learning_rate=0.5, batch_size=6, epochs=2, margin=0.1, label_smoothing=0.2, lora_rank=3)
    reward = replace(reward, lora_alpha=4.0, token_weight=0.7, easy_first_fraction=0.9)
    model = ModelConfig(max_tokens=77, dtype="bfloat16")
    assert training_settings(Config(run=RunConfig(seed=5), model=model, reward=reward)) == RewardTraining(
        learning_rate=0.5, batch_size=6, epochs=2, margin=0.1, label_smoothing=0.2, lora_rank=3, lora_alpha=4.0,
        token_weight=0.7, easy_first_fraction=0.9, max_tokens=77, bf16=True, seed=5,
    )  # fmt: skip


@pytest.mark.slow
def test_several_devices_train_the_reward_model_and_then_its_controls(local_ray: Config, tmp_path: Path) -> None:
    config = Config(
        run=RunConfig(root=str(tmp_path), stages=["reward"]),
        cluster=ClusterConfig(cpus=2, memory_gib=1.0),
        model=ModelConfig(path=str(language_model()), max_tokens=128),
        reward=RewardConfig(controls=["tier_blind"], devices=2, zero_stage=1, on_policy_prompts=0, lora_rank=2),
    )
    with RunContext(config) as context:
        for use, seed in (("pairs", 0), ("held_out_pairs", 1)):
            write_jsonl(context.folder.rows(use), [row.to_json() for row in color_pairs(60, seed)])
        stage.run(context)
        for path in (context.folder.reward, context.folder.controls / "tier_blind"):
            assert read_json(path / "training.json")["steps"] == 4
        assert set(read_json(context.folder.reward_evaluation)) == {"whole", "tier_blind"}


def test_a_batch_that_the_devices_cannot_share_evenly_is_an_error() -> None:
    with pytest.raises(UserError, match=r"reward.batch_size: expected a multiple of reward.devices .*= 3, found 16"):
        RewardConfig(devices=3)
