"""Dashboards and alerts: a run exports the metrics that they query, and each alert fires only when it should."""

import json
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from manifests import build, needs_kustomize
from metric_pages import BOARDS, OBSERVABILITY, expressions, needed, panels, rules, selectors, ungrouped
from watched_run import Seen

from metaalign_rl.monitoring import metric_registry

board = pytest.mark.parametrize("board", BOARDS, ids=lambda path: path.stem)


def test_every_expression_selects_series_by_name() -> None:
    assert len(expressions()) > 50
    for expression in expressions():
        assert all(selector.name for selector in selectors(expression)), expression


def test_every_exported_metric_is_on_the_dashboard() -> None:
    names = {name.removesuffix("_total").removesuffix("_bucket") for name in needed("ray_metaalign_ppo_")}
    assert names - {"ray_metaalign_ppo_finished"} == {f"ray_{name}" for name in metric_registry.EXPORTED} - {
        "ray_metaalign_ppo_finished"
    }


def test_a_run_exports_all_metrics_that_dashboards_and_alerts_query(seen: Seen) -> None:
    scraped = seen.series
    absent = {name for name in needed("ray_") if not name.startswith("ray_metaalign_reward_")} - scraped.keys()
    # The quickstart's settings do not produce these.
    optional = {"kl_loss", "rollout_kl", "corrected", "penalty", "skipped_groups"}
    assert absent <= {f"ray_metaalign_ppo_{name}" for name in optional}, seen.error
    for name, labels in needed("ray_").items():
        if name in scraped:
            assert labels <= scraped[name], name
    assert not ungrouped(scraped)


@board
def test_panels_have_a_unit_and_a_description_and_do_not_overlap(board: Path) -> None:
    found = panels(board)
    assert len({panel["id"] for panel in found}) == len(found)
    for panel in found:
        if panel["type"] != "row":
            assert panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    for one, other in combinations([panel["gridPos"] for panel in found], 2):
        left_or_right = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert left_or_right or above, (one, other)
        assert one["x"] + one["w"] <= 24


def test_the_dashboards_are_as_their_generator_writes_them(tmp_path: Path) -> None:
    copy = tmp_path / "cluster/observability"
    shutil.copytree(OBSERVABILITY, copy)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/metrics.md", tmp_path / "docs")
    shutil.copytree(ROOT / "metaalign_rl", tmp_path / "metaalign_rl", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, copy / "make_boards.py"], check=True)
    for board in BOARDS:
        written = json.loads((copy / "dashboards" / board.name).read_text("utf-8"))
        assert json.loads(board.read_text("utf-8")) == written, "run python cluster/observability/make_boards.py"


def test_every_alert_is_documented_and_tested() -> None:
    trials = [
        trial
        for test in yaml.safe_load((ROOT / "tests/alerts.yaml").read_text("utf-8"))["tests"]
        for trial in test["alert_rule_test"]
    ]
    page = (ROOT / "docs/dashboards.md").read_text("utf-8")
    for group in rules()["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["runbook"] == f"docs/dashboards.md#{rule['alert'].lower()}"
            assert f"### {rule['alert']}\n" in page
            rang = {"exp_alerts" in trial for trial in trials if trial["alertname"] == rule["alert"]}
            assert rang == {True, False}, rule["alert"]


# Only promtool evaluates alerts as Prometheus does. .ci/run installs it; a laptop may lack it.
@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool: apt-get install prometheus")
def test_alerts_fire_only_when_they_should(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))
    shutil.copy(ROOT / "tests/alerts.yaml", tmp_path)
    for words in (["check", "rules", "rules.yaml"], ["test", "rules", "alerts.yaml"]):
        done = subprocess.run(["promtool", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_kustomize
def test_the_kustomization_has_alerts_pods_and_dashboards() -> None:
    kinds = {one["kind"]: one for one in build(OBSERVABILITY)}
    assert set(kinds) == {"ConfigMap", "PodMonitor", "PrometheusRule"}
    assert kinds["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {name: json.loads(text) for name, text in kinds["ConfigMap"]["data"].items()} == {
        path.name: json.loads(path.read_text("utf-8")) for path in BOARDS
    }
