"""Explanations: how each tier moved a score."""

import json
from pathlib import Path

import pytest
from reward_toys import make_row, reward_model

from reward import Scorer, cli, explain

ROW = make_row(system_info="say red", user_info="say blue", response="red")


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.from_pretrained(reward_model(), device="cpu", dtype="float32")


def test_a_tiers_effect_is_the_score_minus_the_score_without_it(scorer: Scorer) -> None:
    (found,) = explain(scorer, [ROW])
    full, without_user = scorer.score([ROW, make_row(system_info="say red", response="red")])
    assert found.score.overall == pytest.approx(full.overall, abs=1e-5)
    assert found.moved["user"] == pytest.approx(full.overall - without_user.overall, abs=1e-5)
    assert set(found.moved) == {"system", "user"}


def test_an_empty_tier_is_not_in_the_explanation(scorer: Scorer) -> None:
    one, none = explain(scorer, [make_row(user_info="say blue", response="red"), make_row(response="red")])
    assert set(one.moved) == {"user"}
    assert none.moved == {}


def test_the_command_prints_text_or_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps(ROW.to_json()))
    command = ["explain", "--model", str(reward_model()), "--input", str(rows)]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "'red' overall" in shown
    assert "moved the overall logit by" in shown
    assert cli.main([*command, "--output", str(output)]) == 0
    assert set(json.loads(output.read_text())["moved"]) == {"system", "user"}
