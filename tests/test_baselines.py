"""The baselines, and the page of their results."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.baselines import BASELINES, merge
from benchmarks.baselines_page import curves, drawing, table, verdicts
from benchmarks.dpo import example
from metaalign_rl.data.world import build


def entry(*following: float, conflict: float = 0.5) -> dict[str, Any]:
    """A baseline's entry with one seed for each figure."""
    seeds = {
        str(seed): {"following": value, "conflict": conflict, "curves": {"gold": [0.5, value]}}
        for seed, value in enumerate(following)
    }
    return {"meaning": "made up", "seeds": seeds}


@pytest.mark.parametrize(
    ("rival", "says"),
    [
        (entry(0.70, 0.72), "`rival` | ahead (+0.215)"),
        (entry(0.70, 0.91), "ahead in every seed (+0.120; +0.040 to +0.200)"),
        (entry(0.91, 0.70), "**undecided** (+0.120; -0.010 to +0.250)"),
        (entry(0.92, 0.96), "**behind in every seed** (-0.015; -0.020 to -0.010)"),
        (entry(0.98, 0.99), "**behind** (-0.060)"),
        (entry(0.10), "one seed only (+0.800)"),
    ],
)
def test_ppo_is_ahead_only_where_its_worst_seed_is_above_the_rivals_best(rival: dict[str, Any], says: str) -> None:
    assert says in "".join(verdicts({"ppo": entry(0.90, 0.95), "rival": rival}))


def test_what_is_no_rival_is_not_compared() -> None:
    assert "sft_clean" not in "".join(verdicts({"ppo": entry(0.9, 0.9), "sft_clean": entry(0.99, 0.99)}))


def test_the_table_has_a_line_for_each_baseline_with_its_spread() -> None:
    lines = table({"ppo": entry(0.90, 0.94), "rival": entry(0.5)}).splitlines()
    assert len(lines) == 4
    assert "0.920 (0.900–0.940)" in lines[2]
    assert "| – |" in lines[3]  # a figure that it does not have


def test_the_curves_are_means_over_the_seeds_and_their_drawing_is_well_formed() -> None:
    lines = curves({"ppo": entry(0.8, 0.9), "none": {"meaning": "", "seeds": {"0": {"following": 1.0}}}})
    assert lines == {"ppo": [0.5, pytest.approx(0.85)]}
    svg = ElementTree.fromstring(drawing(lines))
    assert len(svg.findall("{*}polyline")) == 1


def test_merging_takes_the_mean_of_the_weights(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 3.0)):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.full((2, 2), value)}, tmp_path / name / "model.safetensors")
    merged = merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    assert load_file(merged / "model.safetensors")["weight"].tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_a_pair_goes_to_dpo_with_all_three_tiers() -> None:
    row = build.pairs(0, 1, held_out=False)[0]
    pair = example(row)
    assert pair["prompt"][0] == {"role": "system", "content": row.system_info}
    assert pair["chat_template_kwargs"] == {"user_info": row.user_info}
    assert pair["chosen"][0]["content"] == row.chosen


def test_every_baseline_says_what_it_is() -> None:
    assert {"sft", "sft_clean", "best_of_8", "sft_best_of_8", "ppo", "blind", "soup", "dpo"} <= set(BASELINES)
    assert all(baseline.meaning for baseline in BASELINES.values())
