"""The benchmark of the reward model and its controls, and its tables."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.reward_models import BEST_OF, JUDGES, best_of, pair_accuracy
from benchmarks.reward_models_page import BEGIN, COMPARED, DRAWN, END, PAGE, block, verdicts, write
from metaalign_rl.core.dataflow import RELATIONS
from metaalign_rl.data.gold import Verdict
from metaalign_rl.data.world import build
from metaalign_rl.evaluation.gold_metrics import JudgedResponse


def drawn(*goods: int) -> list[JudgedResponse]:
    """Eight responses to each prompt. The first ones are good; `goods` says how many."""
    rows = build.held_out_prompts(0, len(goods))
    verdicts = {good: Verdict({}, following=good, strict=good) for good in (True, False)}
    return [
        JudgedResponse(row, "it is so", verdicts[i < good])
        for row, good in zip(rows, goods, strict=True)
        for i in range(8)
    ]


def test_pair_accuracy_counts_prompts_with_good_and_bad_answers() -> None:
    assert BEST_OF == 8
    falling, even = [-float(i) for i in range(8)], [0.0] * 8
    assert pair_accuracy(drawn(3), falling) == 1
    assert pair_accuracy(drawn(3), even) == 0  # a tie is wrong
    assert pair_accuracy(drawn(3, 4, 8, 0), [*falling, *even, *even, *even]) == 0.5


def test_best_of_takes_the_answer_with_the_highest_value() -> None:
    answers = drawn(*[1] * len(RELATIONS))
    first = [1.0] + [0.0] * 7
    assert set(best_of(answers, first * len(RELATIONS)).values()) == {1.0}
    assert set(best_of(answers, first[::-1] * len(RELATIONS)).values()) == {0.0}


def results(**means: float) -> dict[str, Any]:
    """Two seeds of every judge. Each metric of a judge is its mean plus or minus 0.01."""
    values = dict.fromkeys(JUDGES, 0.5) | means
    judges = {
        name: {
            "meaning": JUDGES[name],
            "seeds": {str(n): dict.fromkeys((*COMPARED, "ece"), value + 0.01 * (-1) ** n) for n in range(2)},
        }
        for name, value in values.items()
    }
    return {"command": "python -m benchmarks.reward_models", "machine": "2 CPUs", "judges": judges}


def test_each_mode_is_compared_with_the_scalar_model() -> None:
    said = list(verdicts(results(overall=0.9, tier=0.505, composed=0.1, scalar=0.5)["judges"]))
    count = len(COMPARED)
    assert said[0] == "| compared with `scalar` | `overall` | `tier` | `composed` |"
    assert said[2] == (
        "| accuracy | ahead (+0.400) | ahead in every seed (+0.005; +0.005 to +0.005) | **behind** (-0.400) |"
    )
    assert said[-2] == f"| ahead on | {count} of {count} | {count} of {count} | 0 of {count} |"
    assert said[-1] == f"| behind on | 0 of {count} | 0 of {count} | {count} of {count} |"


def test_the_tables_are_written_between_the_marks_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{BEGIN}\nNot measured yet.\n{END}\n\nMore.\n")
    for _ in range(2):
        write(results(), page)
    text = page.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith(f"{END}\n\nMore.\n")
    assert "Not measured yet" not in text
    assert text.count(BEGIN) == text.count("Does scoring by tier help?") == 1
    assert f"| `scalar` | {JUDGES['scalar']} |" in text
    assert "| `scalar` | 0.500 (0.490–0.510) | 0.500 (0.490–0.510) |" in text
    assert "seeds 0 1" in text


def test_a_judge_without_the_metrics_of_a_table_has_no_line_in_it() -> None:
    found = results()
    for seed in found["judges"]["gold"]["seeds"].values():
        for figure in DRAWN:
            del seed[figure]
    text = block(found)
    assert text.count("\n| `gold` |") == 4  # what it is, and the three tables of the pairs
    assert text.count("\n| `tier` |") == 5


def test_the_page_in_the_documentation_has_the_marks(tmp_path: Path) -> None:
    text = PAGE.read_text("utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(SystemExit, match="expected the lines"):
        write(results(), tmp_path / "page.md")
