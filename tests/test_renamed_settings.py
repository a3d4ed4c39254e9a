"""Renamed settings: an old name is an error that names the new one, and the folders of old runs stay readable."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from metaalign_rl.cli.evaluate import load_settings
from metaalign_rl.config import loader
from metaalign_rl.config.keys import keys_of
from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import ClusterConfig, Config, PPOConfig, RewardConfig
from metaalign_rl.core import renamed_settings
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json, write_json
from metaalign_rl.pipeline.resume import claimed, used_settings
from metaalign_rl.pipeline.run import STAGES
from reward import cli as reward_cli
from reward.training.checkpoint_folder import claim_checkpoint_folder
from reward.training.config import RewardTraining

CONFIG = Config(
    cluster=ClusterConfig(layout="disaggregated"),
    learner=LearnerConfig(world_size=2, loss_aggregation="samples", spike_limit=30.0),
    ppo=PPOConfig(stream_chunks=3),
    reward=RewardConfig(easy_first_fraction=0.25),
)
OLD = """\
cluster:
  layout: apart
learners: 2
learner:
  loss_mean: samples
  max_growth: 30
ppo: {parts: 3}
reward.right_first: 0.25
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def old_names(settings: dict[str, object]) -> dict[str, object]:
    """The settings under the keys that they had before."""
    old_keys = {new: old for old, new in renamed_settings.KEYS.items()}
    return {old_keys.get(key, key): value for key, value in settings.items()}


def test_every_new_name_is_a_setting_and_no_old_name_is() -> None:
    keys = keys_of(Config)
    assert set(renamed_settings.KEYS.values()) | set(renamed_settings.VALUES) <= set(keys)
    assert not set(renamed_settings.KEYS) & set(keys)


@pytest.mark.parametrize(
    ("line", "text", "says"),
    [
        (2, "cluster:\n  layout: apart\n", "cluster.layout='apart' was renamed to 'disaggregated'; use the new value"),
        (1, "learners: 2\n", "'learners' was renamed to 'learner.world_size'; use the new key"),
        (3, "learner:\n  epochs: 1\n  loss_mean: samples\n", "'learner.loss_mean' was renamed to 'learner.loss_aggr"),
        (1, "learner: {max_growth: 3}\n", "'learner.max_growth' was renamed to 'learner.spike_limit'; use the new key"),
        (2, "ppo:\n  parts: 3\n", "'ppo.parts' was renamed to 'ppo.stream_chunks'; use the new key"),
        (1, "reward.right_first: 0.1\n", "'reward.right_first' was renamed to 'reward.easy_first_fraction'; use the"),
    ],
)
def test_an_old_name_in_a_file_is_an_error_with_the_line_and_the_new_name(
    line: int, text: str, says: str, tmp_path: Path
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        loader.load(Config, path, [])
    assert str(caught.value).startswith(f"{path}:{line}: {says}")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("learners=2", "'learners=2': 'learners' was renamed to 'learner.world_size'; use the new key"),
        ("ppo={parts: 3}", "'ppo={parts: 3}': 'ppo.parts' was renamed to 'ppo.stream_chunks'; use the new key"),
        ("cluster.layout=apart", "cluster.layout='apart' was renamed to 'disaggregated'; use the new value"),
    ],
)
def test_an_old_name_in_a_word_is_an_error_with_the_new_name(word: str, says: str, tmp_path: Path) -> None:
    for load in (loader.load, loader.load_saved):
        with pytest.raises(UserError) as caught:
            load(Config, write(tmp_path, ""), [word])
        assert says in str(caught.value)


def test_the_config_of_an_old_run_is_read_under_the_new_names(tmp_path: Path) -> None:
    path = write(tmp_path, OLD)
    assert loader.load_saved(Config, path, []) == CONFIG
    assert loader.load_saved(Config, path, ["learner.world_size=4"]).learner.world_size == 4
    assert load_settings(str(tmp_path), []) == CONFIG


def test_a_setting_given_under_both_names_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "learners: 2\nlearner: {world_size: 2}\n")
    with pytest.raises(UserError, match="config.yaml:2: key 'learner.world_size' is already set at .*config.yaml:1"):
        loader.load_saved(Config, path, [])


def old_run(root: Path) -> RunFolder:
    """A run's folder whose records have the old keys."""
    folder = RunFolder(root)
    write_json(
        folder.stages,
        {stage: {"seconds": 1.0, "settings": old_names(used_settings(CONFIG, stage))} for stage in STAGES},
    )
    assert {"learners", "ppo.parts"} <= read_json(folder.stages)["ppo"]["settings"].keys()
    return folder


def test_an_old_run_resumes_under_the_new_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = old_run(tmp_path)
    with claimed(folder, CONFIG) as run:
        assert set(run.records) == set(STAGES) and run.stages_left == []
        run.records.write("ppo", 2.0, run.records["ppo"]["settings"])
    assert "different settings" not in capsys.readouterr().out
    assert not set(renamed_settings.KEYS) & set(read_json(folder.stages)["sft"]["settings"])
    assert loader.load(Config, folder.config, []) == CONFIG


def test_a_changed_setting_of_an_old_run_is_still_an_error(tmp_path: Path) -> None:
    config = replace(CONFIG, learner=replace(CONFIG.learner, world_size=1))
    with pytest.raises(UserError, match=r"learner\.world_size 2 → 1"), claimed(old_run(tmp_path), config):
        pass


def test_an_old_reward_training_resumes_from_its_checkpoints(tmp_path: Path) -> None:
    settings = asdict(RewardTraining(easy_first_fraction=0.25))
    old = {key.replace("easy_first_fraction", "right_first"): value for key, value in settings.items()}
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")
    write_json(tmp_path / "identity.json", {"base": "sft", "config": old})
    assert claim_checkpoint_folder(tmp_path, {"base": "sft", "config": settings}) == str(tmp_path / "checkpoint-4")
    with pytest.raises(UserError, match="another training.s: config differ"):
        claim_checkpoint_folder(tmp_path, {"base": "sft", "config": settings | {"easy_first_fraction": 0.0}})


def test_an_old_option_of_reward_training_is_an_error_that_names_the_new_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", "--base", "a", "--data", "b", "--output", "c", "--right-first", "0.1"]
    with pytest.raises(SystemExit):
        reward_cli.main(words)
    assert "--right-first: was renamed to --easy-first-fraction; use the new option" in capsys.readouterr().err
