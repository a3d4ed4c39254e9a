"""`metaalign-rl evaluate` on a reward model: compared with its run's controls and others, as JSON and as a page."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from reward_toys import color_pairs, language_model, make_row, reward_model

from metaalign_rl.cli import main
from metaalign_rl.cli.evaluate import evaluate
from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Sampling
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json, write_jsonl
from metaalign_rl.evaluation.reward_models import BREAKDOWNS, COMPARED, add_controls, compare, find_controls, measure


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The reward model of a run that has two finished controls and an unfinished one."""
    run = tmp_path / "run"
    for name in ("reward", "controls/scalar", "controls/tier_blind"):
        shutil.copytree(reward_model(), run / name)
    (run / "controls" / "preference_blind.checkpoints").mkdir()
    return run / "reward"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, (row.to_json() for row in color_pairs(40)))
    return path


def test_the_controls_of_a_run_are_found_automatically(model: Path) -> None:
    assert list(find_controls(model)) == ["scalar", "tier_blind"]
    assert find_controls(reward_model()) == {}


def test_other_models_are_given_by_name_and_folder(model: Path) -> None:
    given = [("preference-blind", reward_model()), ("old-one", reward_model())]
    models = add_controls(model, find_controls(model), given)
    assert list(models) == ["reward", "scalar", "tier_blind", "preference_blind", "old-one"]


@pytest.mark.parametrize(
    ("name", "folder", "says"),
    [
        ("tier-blind", reward_model(), "found 'tier_blind', which is .*run/controls/tier_blind; leave out this option"),
        ("reward", reward_model(), "found 'reward', which is .*run/reward; give another name"),
        ("old", language_model(), "--control old=.*: expected a reward model"),
        ("old", Path("nowhere"), "nowhere: expected a run's folder"),
    ],
)
def test_an_error_names_a_control_that_cannot_be_added(model: Path, name: str, folder: Path, says: str) -> None:
    with pytest.raises(UserError, match=says):
        add_controls(model, find_controls(model), [(name, folder)])


def test_a_policy_has_no_controls(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--control scalar: only a reward model has controls"):
        evaluate(str(language_model()), data, tmp_path, Config(), Sampling(), controls=[("scalar", tmp_path)])


def test_a_blind_control_sees_less_and_is_read_in_mode_overall(model: Path) -> None:
    rows = color_pairs(40)
    assert set(measure("reward", model, rows)) == {"tier", "overall", "composed"}
    assert set(measure("scalar", model, rows)) == {"overall"}
    blind = measure("tier_blind", model, rows)["overall"]
    assert blind["tier_flip"]["accuracy"] == 0  # the same both ways


def test_every_model_is_compared_in_the_same_mode(model: Path) -> None:
    """The best of three modes on these pairs would favour the model over controls, which have one mode."""
    reports = measure("reward", model, color_pairs(40))
    accuracies = {mode: report["accuracy"] for mode, report in reports.items()}
    reports["overall"]["accuracy"] = min(accuracies.values()) - 0.1
    found = compare({"reward": reports, "scalar": {"overall": reports["overall"]}})
    assert found["reward"] == found["scalar"]
    assert found["reward"]["mode"] == "overall"
    same = reports["overall"]
    assert found["reward"]["by_relation"] == {name: value["accuracy"] for name, value in same["by_relation"].items()}
    assert found["reward"]["ece"] == same["calibration"]["overall"]["ece"]
    with pytest.raises(UserError, match="old: expected a model that was trained on the label overall"):
        compare({"old": {"tier": same}})


def test_a_metric_that_the_data_or_a_control_cannot_have_is_null(model: Path) -> None:
    texts = ("say red", "red please")
    rows = [
        make_row(id=text, system_info=text, chosen="red", rejected="blue", tags={"paraphrases": "red"})
        for text in texts
    ]
    names = ("reward", "preference_blind")
    found = compare({name: measure(name, model, rows) for name in names})
    for name in names:
        assert found[name]["ece"] is found[name]["over-refusal"] is found[name]["flips"] is None
        assert found[name]["paraphrases, right"] is not None
    assert found["reward"]["paraphrases, alike"] is not None
    assert found["preference_blind"]["paraphrases, alike"] is None  # true by construction


def table(page: str) -> dict[str, list[str]]:
    """The cells of the page's first table, by the header of their row."""
    text = page.partition('<table class="models">')[2].partition("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in text.split("<tr")]
    return {row[0]: row[1:] for row in rows if row}


def test_the_page_has_a_column_for_each_model_and_a_row_for_each_metric(
    model: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    metrics = evaluate(str(model), data, output, Config(), Sampling(), controls=[("old", reward_model())])
    assert read_json(output / "figures.json") == metrics
    assert list(metrics["models"]) == list(metrics["comparison"]) == ["reward", "scalar", "tier_blind", "old"]
    rows = table((output / "evaluation.html").read_text("utf-8"))
    assert rows[""] == ["reward", "scalar", "tier_blind", "old", "n", ""]
    assert rows["mode"][:2] == [metrics["comparison"]["reward"]["mode"], "overall"]
    groups = [group for key in BREAKDOWNS for group in metrics["comparison"]["reward"][key]]
    assert {"accuracy", "flips", *(name for name, _, _ in COMPARED), *groups} <= set(rows)
    assert rows["accuracy"][4] == "40"
    assert rows["accuracy"][1] == f"{metrics['models']['scalar']['overall']['accuracy']:.3f}"
    assert rows["paraphrases, right"][:4] == ["–"] * 4


def test_the_command_prints_every_model(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--data", str(data), "--output", str(tmp_path / "out"), "--control", f"old={reward_model()}"]
    assert main.main(["evaluate", str(model), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["reward", "scalar", "tier_blind", "old"]
    assert re.search(r"tier 0\.\d+ overall 0\.\d+ composed 0\.\d+$", lines[0])
    with pytest.raises(SystemExit):
        main.main(["evaluate", str(model), *words, "--control", "old"])
    assert "expected NAME=DIR, found 'old'" in capsys.readouterr().err
