"""HTML pages: hostile texts never become markup, and a page's script reads the data that it was given."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from metaalign_rl import report
from metaalign_rl.chat.session import Session
from metaalign_rl.cli.evaluate import write_report
from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.dataflow import Sampling
from metaalign_rl.core.files import read_json, write_jsonl
from metaalign_rl.data.world import build
from metaalign_rl.evaluation.gold_metrics import judge_all
from metaalign_rl.pages.render import render
from metaalign_rl.report.training_curves import read_training

HOSTILE = "</script><script>alert(1)</script><!-- \u2028 & \"'"
START = Session(None, HOSTILE)  # type: ignore[arg-type]


def script_data(page: str) -> Any:
    """The data that the page's script parses."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_a_pages_script_reads_the_given_data_unchanged(value: Any) -> None:
    assert script_data(render("chat", {"value": value}, name="x", start=START))["value"] == value


def test_texts_never_become_markup() -> None:
    page = render("chat", {"answer": HOSTILE}, name=HOSTILE, start=START)
    assert "<script>alert" not in page
    assert script_data(page)["answer"] == HOSTILE


def test_responses_never_become_markup(tmp_path: Path) -> None:
    judged = judge_all(build.prompts(0, 20), [HOSTILE] * 20)
    write_report(HOSTILE, Path("rows.jsonl"), tmp_path, judged, Sampling())
    page = (tmp_path / "evaluation.html").read_text("utf-8")
    assert "<script>alert" not in page
    assert str(escape(HOSTILE)) in page


def test_a_page_loads_no_other_files(tiny_run: Path) -> None:
    page = (tiny_run / "report.html").read_text("utf-8")
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "@import" not in page
    assert "url(" not in page


def test_the_report_of_a_run_has_every_section(tiny_run: Path) -> None:
    page = (tiny_run / "report.html").read_text("utf-8")
    parts = re.findall(r'<section id="([\w-]+)"', page)
    assert parts == ["following", "training", "reward", "matrix", "held-out", "rollouts", "config"]
    figures = read_json(tiny_run / "evaluation" / "figures.json")
    for relation in figures["ppo_sampled"]["by"]["relation"]:
        assert f"<th>{relation}</th>" in page
    for view in figures["robustness"].values():
        assert str(escape(view["meaning"])) in page
    data = script_data(page)
    assert data["training"]["step"] == [1, 2, 3, 4, 5, 6]
    assert {"kl", "entropy", "gold", "proxy", "response_tokens", "tier/system/refused"} <= set(data["training"])
    assert set(data["reliability"]) == {"system", "user", "dialog", "overall"}


def test_a_long_runs_curves_show_means_over_several_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaalign_rl.report.training_curves.MAX_POINTS", 2)
    steps = [{"step": step, "kl": float(step), "samples": 4, "seconds_step": 2.0} for step in range(1, 6)]
    steps[4]["kl"] = float("nan")
    write_jsonl(tmp_path / "metrics.jsonl", [{**step, "seconds_learn": 1.0} for step in steps])
    found = read_training(RunFolder(tmp_path))
    assert found is not None
    assert (found.steps_per_point, found.columns["step"], found.columns["kl"]) == (3, [3, 5], [2.0, 4.0])
    assert (found.steps, found.responses, found.seconds, found.shares) == (5, 20, 10.0, {"learn": 0.5})


def test_the_report_can_be_built_again_from_the_runs_files(tiny_run: Path) -> None:
    before = (tiny_run / "report.html").read_text("utf-8")
    report.build(RunFolder(tiny_run), "overall")
    after = (tiny_run / "report.html").read_text("utf-8")
    assert [line for line in after.splitlines() if "seconds.report" not in line] == [
        line for line in before.splitlines() if "seconds.report" not in line
    ]
