"""Which tier moved a score."""

import json
from pathlib import Path

import pytest
from reward_toys import make_row, reward_model

from reward import Scorer, cli, explain

ROW = make_row(system_info="say red", user_info="say blue", response="red")


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.from_pretrained(reward_model(), device="cpu", dtype="float32")


def test_a_tier_moved_a_score_by_what_it_is_without_that_tier(scorer: Scorer) -> None:
    (found,) = explain(scorer, [ROW])
    whole, deaf = scorer.score([ROW, make_row(system_info="say red", response="red")])
    assert found.score.overall == pytest.approx(whole.overall, abs=1e-5)
    assert found.moved["user"] == pytest.approx(whole.overall - deaf.overall, abs=1e-5)
    assert set(found.moved) == {"system", "user"}


def test_a_tier_that_says_nothing_moves_nothing(scorer: Scorer) -> None:
    one, none = explain(scorer, [make_row(user_info="say blue", response="red"), make_row(response="red")])
    assert set(one.moved) == {"user"}
    assert none.moved == {}


def test_the_command_says_it_in_words_or_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps(ROW.to_json()))
    command = ["explain", "--model", str(reward_model()), "--input", str(rows)]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "'red' overall" in shown
    assert "moved the overall logit by" in shown
    assert cli.main([*command, "--output", str(output)]) == 0
    assert set(json.loads(output.read_text())["moved"]) == {"system", "user"}
