"""The benchmark of the algorithms: its variants and its table."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import algorithms
from benchmarks.algorithms import FIGURES, SHARED, VARIANTS, Bench, measure, table
from metaalign_rl.config.loader import dump, load
from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.files import read_json, write_text


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    run = RunFolder(tmp_path / "quickstart")
    for shared in SHARED:
        (run.root / shared).mkdir(parents=True)
    write_text(run.config, dump(Config()))
    return Bench(run, tmp_path / "root", parallel=2, words=["ppo.steps=2"])


def figures(value: float, **more: float) -> dict[str, float]:
    return dict.fromkeys(FIGURES, value) | {"seconds": 10.0, "kl": 0.6} | more


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_only_the_ppo_stage(bench: Bench, name: str) -> None:
    config = load(Config, bench.run.config, bench.settings(name, seed=3))
    assert (config.ppo.steps, config.run.seed, config.cluster.cpus) == (2, 3, 1)
    assert config.run.stages == ["ppo", "evaluate"]
    assert (config.data, config.sft, config.reward) == (Config().data, Config().sft, Config().reward)
    assert config.ppo.algorithm == (name if name in ("rloo", "reinforce++", "grpo") else "ppo")


def test_finished_measurements_are_not_repeated(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def measured(self: Bench, name: str, seed: int) -> dict[str, Any]:
        asked.append((name, seed))
        return figures(0.5)

    monkeypatch.setattr(Bench, "measure", measured)
    measure(bench, ["ppo", "grpo"], [0], tmp_path / "out.json")
    measure(bench, ["ppo", "grpo", "rloo"], [0, 1], tmp_path / "out.json")
    assert sorted(asked) == [("grpo", 0), ("grpo", 1), ("ppo", 0), ("ppo", 1), ("rloo", 0), ("rloo", 1)]
    assert set(read_json(tmp_path / "out.json")["variants"]["rloo"]["seeds"]) == {"0", "1"}
    other = Bench(bench.run, bench.root, bench.parallel, ["ppo.steps=3"])
    with pytest.raises(SystemExit, match="expected results of .*found .*give another --json"):
        measure(other, ["ppo"], [0], tmp_path / "out.json")


def test_the_table_shows_the_kl_and_its_target() -> None:
    seeds = {"0": figures(0.9, kl_target=0.5), "1": figures(0.8, kl_target=0.5)}
    lines = list(table({"variants": {"ppo": {"seeds": {"0": figures(0.7)}}, "adaptive_kl": {"seeds": seeds}}}))
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert lines[2].startswith("| `ppo` | 1 | 0.700 |")
    assert lines[2].endswith("| 0.60 | 10 |")
    assert lines[3].startswith("| `adaptive_kl` | 2 | 0.850 (0.800–0.900) |")
    assert lines[3].endswith("| 0.60 (0.60–0.60) (0.5) | 10 |")


def test_a_folder_that_is_not_a_finished_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["algorithms", "--run", str(tmp_path), "--json", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match="2"):
        algorithms.main()
