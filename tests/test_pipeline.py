"""A run's folder: which settings may change when a run resumes, its rows, and its report."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from metaalign_rl import report
from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config, DataConfig, ModelConfig, PPOConfig, RolloutConfig, RunConfig, SFTConfig
from metaalign_rl.core.checkpoints import newest_trainer_checkpoint
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json, write_json, write_jsonl
from metaalign_rl.pipeline.context import RunContext
from metaalign_rl.pipeline.resume import OPEN, OPERATIONAL, USED, ClaimedRun, claimed, has_begun, used_settings
from metaalign_rl.pipeline.run import STAGES
from metaalign_rl.pipeline.stages import data, evaluate
from metaalign_rl.pipeline.stages.data import USES

CONFIG = Config()


def begun(folder: RunFolder, *stages: str, config: Config = CONFIG, seconds: float | None = None) -> RunFolder:
    """A run's folder in which these stages have begun, or have finished after `seconds`."""
    write_json(
        folder.stages, {stage: {"seconds": seconds, "settings": used_settings(config, stage)} for stage in stages}
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def claim(folder: RunFolder, config: Config) -> ClaimedRun:
    """The run as another driver would find it."""
    with claimed(folder, config) as run:
        return run


def test_a_new_run_may_have_any_settings_and_saves_them(folder: RunFolder) -> None:
    assert not has_begun(folder)
    run = claim(folder, CONFIG)
    assert (list(run.records), run.stages_left) == ([], list(STAGES))
    assert "prompts_per_step" in folder.config.read_text()


def test_a_run_with_the_same_settings_resumes(folder: RunFolder) -> None:
    begun(folder, *STAGES, seconds=1.5)
    assert has_begun(folder)
    run = claim(folder, CONFIG)
    assert run.records["sft"]["seconds"] == 1.5
    assert run.stages_left == []


def test_only_finished_stages_are_skipped(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    begun(folder, "data", "sft", seconds=1.5)
    records = read_json(folder.stages)
    write_json(folder.stages, records | {"sft": records["sft"] | {"seconds": None}})
    assert claim(folder, replace(CONFIG, run=RunConfig(stages=["data", "sft", "ppo"]))).stages_left == ["sft", "ppo"]
    assert capsys.readouterr().out == "data: finished before, skipped\n"


@pytest.mark.parametrize("seconds", [None, 3.0], ids=["begun", "finished"])
def test_a_changed_setting_of_a_stage_that_has_begun_is_an_error(folder: RunFolder, seconds: float | None) -> None:
    begun(folder, "sft", seconds=seconds)
    with pytest.raises(UserError, match=r"stage `sft` .*\(sft.learning_rate 0.002 → 0.1\); give another run.name"):
        claim(folder, replace(CONFIG, sft=SFTConfig(learning_rate=0.1)))


def test_a_changed_setting_of_an_earlier_stage_is_an_error(folder: RunFolder) -> None:
    begun(folder, "ppo")
    for config in (replace(CONFIG, model=ModelConfig(layers=2)), replace(CONFIG, run=RunConfig(seed=7))):
        with pytest.raises(UserError, match=r"model\.layers|run\.seed"):
            claim(folder, config)


def test_operational_settings_may_change_and_the_change_is_printed(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(folder, "reward", seconds=9.0)
    claim(folder, replace(CONFIG, rollout=RolloutConfig(engines=4)))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "resumed with different settings: rollout.engines 1 → 4"


def test_an_unfinished_stage_may_get_more_steps_and_a_finished_one_may_not(folder: RunFolder) -> None:
    longer = replace(CONFIG, ppo=PPOConfig(steps=99))
    claim(begun(folder, "ppo"), longer)
    with pytest.raises(UserError, match=r"ppo\.steps 60 → 99"):
        claim(begun(folder, "ppo", seconds=5.0), longer)


def test_every_setting_that_may_change_exists() -> None:
    known = set().union(*(used_settings(CONFIG, stage) for stage in STAGES))
    assert known >= OPERATIONAL | set().union(*map(set, OPEN.values()))


def test_a_changed_setting_of_a_later_stage_is_allowed(folder: RunFolder) -> None:
    begun(folder, "data", "sft", seconds=1.0)
    later = replace(CONFIG, ppo=PPOConfig(steps=3), rollout=RolloutConfig(engines=2))
    assert set(claim(folder, later).records) == {"data", "sft"}


@pytest.mark.parametrize(("before", "now"), [({}, {"user": 1.0}), ({"user": 1.0}, {}), ({"user": 1.0}, {"user": 2.0})])
def test_a_table_setting_is_compared_with_all_its_entries(
    folder: RunFolder, before: dict[str, float], now: dict[str, float]
) -> None:
    begun(folder, "ppo", config=replace(CONFIG, ppo=PPOConfig(sampler=before)))
    with pytest.raises(UserError, match=r"ppo\.sampler .* → "):
        claim(folder, replace(CONFIG, ppo=PPOConfig(sampler=now)))


def test_an_added_or_removed_setting_is_a_change(folder: RunFolder) -> None:
    settings = used_settings(CONFIG, "data") | {"data.forgotten": 1}
    write_json(folder.stages, {"data": {"seconds": 1.0, "settings": settings}})
    with pytest.raises(UserError, match=r"data\.forgotten 1 → None"):
        claim(folder, CONFIG)


def test_a_stage_depends_on_the_settings_of_the_stages_before_it() -> None:
    stages = list(STAGES)
    for earlier, later in pairwise(stages):
        assert set(USED[earlier]) <= set(USED[later])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RunConfig(name="a/b"), "run.name: expected a folder's name"),
        (lambda: RunConfig(name=".."), "run.name"),
        (lambda: ModelConfig(hidden_size=100, heads=3), "model.heads: expected a divisor of model.hidden_size=100"),
        (lambda: PPOConfig(steps=0), "ppo.steps: expected 1 or more, found 0"),
        (lambda: PPOConfig(model_weight=0), "all are 0, so there is no reward"),
        (lambda: PPOConfig(sampler={"user": -1.0}), r"ppo.sampler.user: expected 0 or more, found -1.0"),
        (lambda: LearnerConfig(world_size=0), "learner.world_size: expected 1 or more"),
        (lambda: Config(model=ModelConfig(max_tokens=32)), "rollout.max_new_tokens: expected less than"),
    ],
)
def test_a_setting_out_of_range_is_an_error(make: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()


# The checkpoints that stages start from.


def test_sft_resumes_from_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert newest_trainer_checkpoint(tmp_path / "none") is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 11:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"epoch": 1')  # killed while it was written
    assert newest_trainer_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "model.path: there is no policy to start from; run the stage sft, or give a checkpoint"),
        ("absent/folder/of", "absent/folder/of: no such folder"),
        (".", "expected a checkpoint, found no config.json"),
    ],
)
def test_without_sft_a_policy_must_be_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with RunContext(replace(CONFIG, model=ModelConfig(path=path))) as context, pytest.raises(UserError, match=says):
        context.start_policy()


def test_evaluating_without_a_trained_policy_is_an_error_before_any_decoding(tmp_path: Path) -> None:
    config = replace(CONFIG, run=RunConfig(root=str(tmp_path)))
    with RunContext(config) as context, pytest.raises(UserError, match="run the stage ppo first"):
        evaluate.run(context)


# The user's own rows.

ROW = {
    "id": "a",
    "family": "helpful",
    "relation": "system_only",
    "tier": "system",
    "system_info": "be brief",
    "user_info": "",
    "messages": [{"role": "user", "content": "who?"}],
}
CHECKS = {"checks": {"system": {"name": "nothing"}}}


def own_rows(folder: Path, **uses: dict[str, Any]) -> Config:
    """A config of all stages, with one row per use."""
    for use, fields in uses.items():
        write_jsonl(folder / f"{use}.jsonl", [ROW | fields])
    return replace(CONFIG, data=DataConfig(source="jsonl", path=str(folder)))


ANSWERS = {
    "demonstrations": {"response": "me"},
    "pairs": {"chosen": "me", "rejected": "you"},
    "prompts": {},
    "held_out_prompts": CHECKS,
    "held_out_pairs": {"chosen": "me", "rejected": "you"},
    "paraphrases": CHECKS | {"tags": {"paraphrases": "0"}},
}
OPTIONAL = ("held_out_pairs", "paraphrases")  # without them only a metric is missing


def test_rows_of_every_use_are_copied_into_the_run(tmp_path: Path) -> None:
    data.run(own_rows(tmp_path / "rows", **ANSWERS), tmp_path / "data")
    assert {path.stem for path in (tmp_path / "data").iterdir()} == set(USES)


@pytest.mark.parametrize("use", USES)
def test_the_data_stage_finds_missing_rows_of_every_stage(tmp_path: Path, use: str) -> None:
    config = own_rows(tmp_path, **{name: fields for name, fields in ANSWERS.items() if name != use})
    if use in OPTIONAL:
        data.run(config, tmp_path / "data")
        return
    with pytest.raises(UserError, match=rf"{use}\.jsonl: expected .* for the stage \w+, found none; add some"):
        data.run(config, tmp_path / "data")


def test_with_a_given_reward_model_no_pairs_are_needed(tmp_path: Path) -> None:
    config = own_rows(tmp_path, **{name: fields for name, fields in ANSWERS.items() if "pairs" not in name})
    data.run(replace(config, reward=replace(config.reward, path="somewhere")), tmp_path / "data")


@pytest.mark.parametrize(
    ("use", "fields", "says"),
    [
        ("demonstrations", {}, r"demonstrations\.jsonl:1: field 'response'"),
        ("pairs", {}, r"pairs\.jsonl:1: field 'chosen'"),
        (
            "held_out_pairs",
            {"response": "me", "labels": {"response": {"overall": True}}},
            "expected a pair, found nothing",
        ),
        ("held_out_prompts", {}, r"held_out_prompts\.jsonl:1: field 'checks\.system'"),
        (
            "paraphrases",
            {"checks": {"system": {"name": "nothing"}}},
            r"paraphrases\.jsonl:1: field 'tags\.paraphrases'",
        ),
        ("prompts", {"checks": {"system": {"name": "nothin"}}}, r"prompts\.jsonl:1: field 'checks\.system': unknown"),
    ],
)
def test_an_error_names_a_row_without_a_field_that_its_use_needs(
    tmp_path: Path, use: str, fields: Any, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        data.run(own_rows(tmp_path, **ANSWERS | {use: fields}), tmp_path / "data")


# The report.


def finished_run(folder: RunFolder, source: str = "world", empty: float = 0.0) -> RunFolder:
    """A run of two held-out rows whose texts look like rich's markup."""

    def figures(share: float) -> dict[str, Any]:
        by = {"kind": {"[/b]": {"following": share, "rows": 2}}}
        return {"following": share, "by": by}

    runs = {f"{policy}_{decoding}": figures(0.5) for policy in ("sft", "ppo") for decoding in ("sampled", "greedy")}
    texts = ("system_info", "user_info", "question", "sft", "ppo")
    showcase = [dict.fromkeys(texts, "say [bold]x[/bold] [/nothing]")]
    table = {"source": source, "empty": figures(empty), "showcase": showcase}
    write_json(folder.evaluation / "figures.json", {**runs, **table})
    write_jsonl(folder.rows("held_out_prompts"), [ROW | CHECKS])
    verdict = {"passes": {"system": False}, "following": False, "strict": False}
    write_jsonl(folder.evaluation / "ppo_sampled.jsonl", [{"id": "a", "answer": "say [b]x[/b]", **verdict}])
    return begun(folder, *STAGES, seconds=30.0)


def evaluated_reward(folder: RunFolder) -> None:
    none = {"accuracy": None}
    whole = {"accuracy": 0.75, "flip": none, "conflict": none}
    write_json(
        folder.reward_evaluation, {"whole": {"tier": whole}, "preference_blind": {"overall": {"accuracy": None}}}
    )


def test_undefined_metrics_are_left_out_of_the_report(folder: RunFolder) -> None:
    evaluated_reward(finished_run(folder))
    built = report.build(folder, "tier")
    assert {name for name in built if name.startswith("reward.")} == {"reward.accuracy"}
    assert built["seconds.ppo"] == 30.0
    assert 0 <= built["seconds.report"] < built["seconds.ppo"]
    assert read_json(folder.report) == built


def test_a_stage_that_has_only_begun_has_no_seconds(folder: RunFolder) -> None:
    finished_run(folder)
    begun(folder, "ppo")
    assert "seconds.ppo" not in report.build(folder, "tier")


def test_texts_with_markup_are_shown_unchanged(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated_reward(finished_run(folder))
    report.build(folder, "tier")
    report.show(folder.root)
    shown = capsys.readouterr().out
    assert "kind [/b]" in shown
    assert "[bold]x[/bold]" in shown
    assert "all pairs" in shown
    assert "/reward" not in shown  # there is no reward model


@pytest.mark.parametrize(
    ("source", "empty", "is_shown"), [("world", 0.0, False), ("world", 0.2, True), ("jsonl", 0.0, True)]
)
def test_the_score_of_an_empty_response_is_shown_where_it_is_informative(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], source: str, empty: float, is_shown: bool
) -> None:
    report.build(finished_run(folder, source, empty), "tier")
    report.show(folder.root)
    assert ("empty response" in capsys.readouterr().out) is is_shown
