"""The PPO benchmarks: how they summarize measurements, and that the scripts run."""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import ROOT

from benchmarks import chaos
from benchmarks.drawing import Panel, drawing
from benchmarks.workloads import scaling, toy, w1, w2
from benchmarks.workloads.common import Timing, parts_of, seconds, write_config
from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config


def test_a_steps_time_is_its_own_metric_or_the_sum_of_its_parts() -> None:
    parts = {"seconds_rollout": 1.0, "seconds_learn": 2.0, "reward": 9.0}
    assert seconds(parts) == 3.0
    assert seconds(parts | {"seconds_step": 2.5}) == 2.5


def test_the_medians_of_the_parts_exclude_the_first_step() -> None:
    lines = [{"step": step, "seconds_learn": took} for step, took in enumerate((9.0, 1.0, 3.0))]
    assert parts_of(lines) == {"seconds_learn": 2.0}


def one_round(startup: float, *steps: float) -> dict[str, Any]:
    return {"startup_s": startup, "step_s_median": steps[-1], "step_s": list(steps)}


def test_w1_takes_medians_over_rounds_and_compares_ours_with_theirs() -> None:
    ours = w1.summary([one_round(10, 9, 1, 1), one_round(30, 9, 2, 3), one_round(20, 9, 2, 2)])
    assert (ours["startup_s"], ours["step_s_median"], ours["samples_per_second"]) == (20, 2, 64)
    assert len(ours["step_s"]) == 9
    theirs = w1.summary([one_round(100, 9, 4, 4)])
    assert w1.ratios({"ours": ours, "openrlhf": theirs, "ours_rloo": ours}) == {
        "startup: ours / openrlhf": 0.2,
        "step: ours / openrlhf": 0.5,
    }


def test_w1_gives_the_product_the_workload_of_the_peer(tmp_path: Path) -> None:
    longest = w1.make_ours(tmp_path, prompts=6)
    assert longest < 2 * 8 + 3  # eight words
    inputs = [json.loads(line)["input"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (tmp_path / "data" / "prompts.jsonl").read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == inputs
    own = {"reward.function": f"{tmp_path}/reward.py:count_of_a"}
    write_config(tmp_path / "config.yaml", w1.SETTINGS | w1.PPO | own)
    config = loader.load(Config, tmp_path / "config.yaml", [])
    assert (config.model.dtype, config.ppo.prompts_per_step) == ("bfloat16", w1.SAMPLES)


def test_w2_computes_the_share_of_the_peak_for_each_part() -> None:
    shape = toy.Shape(hidden=64, layers=1, wide=64)
    layer = 4 * 64**2 + 3 * 64 * 64
    assert shape.flops(tokens=10, predicted=4, length=0, vocabulary=100) == 2 * (layer * 10 + 64 * 100 * 4)
    metrics = {"samples": 2, "response_tokens": 4.0, "seconds_rollout": 1.0, "seconds_reference": 2.0}
    peak = {"gflops_bfloat16": 1.0, "gb_per_s_copy": 1.0}
    found = w2.shares(metrics | {"seconds_learn": 2.0}, shape, 100, peak)
    assert found["reference"]["share_of_peak"] == pytest.approx(found["reference"]["gflops"])
    assert found["rollout"]["gflops"] < 2 * found["reference"]["gflops"] < 3 * found["rollout"]["gflops"]


def test_w2_groups_the_time_of_an_update_by_kind() -> None:
    found = w2.by_kind({"aten::mm": 5.0, "aten::addmm": 1.0, "aten::_softmax": 2.0, "detach": 2.0}, longest=1)
    assert found["kinds"]["matrix products"] == pytest.approx(0.6)
    assert found["kinds"]["everything else"] == pytest.approx(0.2)
    assert found["operations"] == {"aten::mm": 0.5}


def test_scaling_draws_one_panel_per_axis_without_small_parts() -> None:
    parts = {"seconds_learn": 0.5, "seconds_transfer": 0.001, "seconds_step": 1.0}
    points = [{"value": value, "step_s_median": 1.0, "parts": parts} for value in (1, 2)]
    panels = scaling.panels({name: {"measured": points} for name in scaling.AXES})
    assert [panel.title for panel in panels] == list(scaling.AXES)
    assert panels[0].lines == {"step": [(1, 1.0), (2, 1.0)], "learn": [(1, 0.5), (2, 0.5)]}


def test_a_drawing_is_well_formed_with_the_largest_value_on_top() -> None:
    svg = ElementTree.fromstring(drawing([Panel("a < b", {"step": [(1, 0.0), (2, 4.0)]})], "seconds"))
    (line,) = svg.iter("{http://www.w3.org/2000/svg}polyline")
    (_, low), (_, high) = (map(float, point.split(",")) for point in line.attrib["points"].split())
    assert high < low
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", "seconds", "step", "1", "2"} <= set(texts)


# Chaos


def test_the_seed_determines_the_kills_which_are_in_order() -> None:
    kills = chaos.plan(20, steps=46, seed=0, step_seconds=0.5)
    assert kills == chaos.plan(20, steps=46, seed=0, step_seconds=0.5) != chaos.plan(20, 46, 1, 0.5)
    assert [kill.after for kill in kills] == sorted(kill.after for kill in kills)
    assert {kill.who for kill in kills} == set(chaos.TARGETS)
    assert kills[-1].after <= 46 - chaos.QUIET
    assert all(0 <= kill.delay <= 1 for kill in kills)


def test_runs_are_equal_if_they_differ_only_in_times_and_faults() -> None:
    calm = [{"step": 1, "reward": 0.1, "seconds_step": 1.0}, {"step": 2, "reward": 0.2, "seconds_step": 1.0}]
    same = [line | {"seconds_step": 5.0, "faults": 3} for line in calm]
    assert chaos.compare(calm, same)["equal"]
    (off,) = chaos.compare(calm, [calm[0], calm[1] | {"reward": 0.2 + 1e-16 + 1e-15}])["differences"]
    assert (off["step"], off["key"]) == (2, "reward")
    for lines in (calm[:1], [*calm, calm[1]], calm[::-1]):
        compared = chaos.compare(calm, lines)
        assert not compared["equal"] and not compared["each_step_once"]


def test_processes_are_found_below_the_driver() -> None:
    nested = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", nested], stdin=subprocess.PIPE) as process:
        while not (found := list(chaos.descendants(process.pid))):
            pass
        assert len(found) == 1
        assert process.stdin is not None
        process.stdin.close()
    assert list(chaos.descendants(process.pid)) == []


# Scripts


@pytest.mark.parametrize("script", ["ppo.py", "chaos.py", "gpu_learner.py", "gpu_weights.py"])
def test_each_script_runs_from_any_folder(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


def run_script(script: str, output: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--device", "cpu", "--tiny", *words]
    done = subprocess.run([*command, "--json", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, Any] = json.loads(output.read_text())
    return figures


@pytest.mark.slow
def test_the_gpu_scripts_also_run_on_a_cpu(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as both:  # most of the time is startup
        training = both.submit(run_script, "gpu_learner.py", tmp_path / "learner.json", "--stages", "2")
        weights = run_script("gpu_weights.py", tmp_path / "weights.json")
        (learner,) = training.result()["measured"]
    assert learner["zero_stage"] == 2
    assert learner["train"]["tokens_per_second"] > 0
    assert list(weights["routes"]) == ["store"]
    assert weights["routes"]["store"]["gb_per_s"] > 0


def one_run(config: Path, folder: Path) -> tuple[Timing, list[dict[str, Any]]]:
    """The result of a run that did not take place: every part took a second."""
    parts = dict.fromkeys(("seconds_rollout", "seconds_reference", "seconds_learn"), 1.0)
    lines = [{"step": step, "samples": 8, "response_tokens": 8.0, **parts} for step in (1, 2)]
    assert loader.load(Config, config, []).run.name == folder.name
    return Timing(10.0, [3.0, 3.0]), lines


def test_scaling_runs_a_point_of_several_axes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    monkeypatch.setattr(scaling, "train", lambda config, folder: (runs.append(folder.name), one_run(config, folder))[1])
    scaling.run(argparse.Namespace(tiny=True, json=tmp_path / "scaling.json"))
    assert len(runs) == len(set(runs)) == 1 + sum(len(values) - 1 for _, values in scaling.AXES.values())
    axes = json.loads((tmp_path / "scaling.json").read_text())["axes"]
    assert [point["value"] for point in axes["engines"]["measured"]] == [1, 2]
    ElementTree.parse(tmp_path / "scaling.svg")


@pytest.mark.slow
def test_w2_compares_a_run_with_the_peak_and_profiles_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(w2, "train", one_run)
    w2.run(argparse.Namespace(tiny=True, json=tmp_path / "w2.json"))
    found = json.loads((tmp_path / "w2.json").read_text())
    assert set(found["parts"]) == {"rollout", "reference", "learn"}
    assert found["peak"]["gflops_float32"] > 1
    assert sum(found["update"]["kinds"].values()) == pytest.approx(1)
