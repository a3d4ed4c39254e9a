"""Compare the reward model, in each mode, with its controls over several seeds.

    python -m benchmarks.reward_models              # seeds 0 1 2: some minutes each on 2 cores
    python -m benchmarks.reward_models --seeds 1    # one of them

For each seed, the data, the SFT policy, the reward model and its three controls are those of a quickstart run. All
models train on the same rows. They are evaluated on the held-out pairs, and on answers that the SFT policy samples to
the held-out prompts. The runs are kept under `--root`. Seeds that are already in the output file are not measured
again. Writes `benchmarks/results/reward_models.json` and the tables of `docs/reward-model.md`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import reward_models_page
from benchmarks.about import RESULTS, machine
from benchmarks.baselines import BEST_OF, CONFIG, command, headline
from benchmarks.reward_models_page import JUDGES
from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.core.arguments import path
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.files import read_json, write_json
from metaalign_rl.core.rows import read_rows
from metaalign_rl.core.views import CONTROLS, apply_view
from metaalign_rl.evaluation.gold_metrics import JudgedResponse, judge_all, summary
from metaalign_rl.evaluation.reward_models import compare
from reward.training.controls import modes_of, view_of

STAGES = ["run.stages=[data, sft, reward]", f"reward.controls=[{', '.join(CONTROLS)}]"]
Figures = dict[str, Any]


def main() -> int:
    """Measure the seeds that have no results yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings that override the quickstart's; give "
        "them before the options")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--root", type=path, default=Path("runs/reward-models"), help="the folder of the runs")
    parser.add_argument("--output", type=path, default=RESULTS / "reward_models.json", help="the JSON file to write")
    parser.add_argument("--page", type=path, default=reward_models_page.PAGE, help="the page to write the tables to")
    args = parser.parse_args()
    measure(args.seeds, args.root.absolute(), args.output, args.words)
    reward_models_page.write(read_json(args.output), args.page)
    return 0


def measure(seeds: Sequence[int], root: Path, output: Path, words: Sequence[str]) -> None:
    """Measure each seed. Write the results after each."""
    config = loader.dump(loader.load(Config, Path(CONFIG), [*STAGES, *words]))
    results = read_json(output) if output.is_file() else {"config": config, "judges": {}}
    if results["config"] != config:
        raise SystemExit(f"{output}: expected results of the same settings, found others; give another --output")
    for seed in seeds:
        if any(str(seed) in entry["seeds"] for entry in results["judges"].values()):
            continue
        found = measure_seed(seed, root, words)
        for name, meaning in JUDGES.items():
            results["judges"].setdefault(name, {"meaning": meaning, "seeds": {}})["seeds"][str(seed)] = found[name]
            print(f"{name} {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in found[name].items()))
        made = " ".join(["python -m benchmarks.reward_models", *words])
        write_json(output, results | {"machine": machine(), "command": made})


def measure_seed(seed: int, root: Path, words: Sequence[str]) -> dict[str, Figures]:
    """Measure every judge with one seed. An interrupted run resumes."""
    words = [*STAGES, *words, f"run.seed={seed}", f"run.name=seed-{seed}", f"run.root={root}"]
    folder = root / f"seed-{seed}"
    command("run", CONFIG, *words)
    pairs, output = folder / "data" / "held_out_pairs.jsonl", folder / "judged"
    command("evaluate", str(folder / "reward"), "--data", str(pairs), "--output", str(output))
    models = read_json(output / "figures.json")["models"]
    found = {
        name if name in CONTROLS else mode: _numbers(compare({name: {mode: report}})[name])
        for name, modes in models.items()
        for mode, report in modes.items()
    }
    config = loader.load(Config, Path(CONFIG), words)
    for name, figures in on_policy(folder, draw(folder, config)).items():
        found[name] = found.get(name, {}) | figures
    return found


def _numbers(figures: Figures) -> Figures:
    return {name: value for name, value in figures.items() if isinstance(value, float)}


def draw(folder: Path, config: Config) -> list[JudgedResponse]:
    """Sample `BEST_OF` answers of the SFT policy to each held-out prompt, and judge them by the checks."""
    path = folder / "judged" / "drawn.json"
    rows = [row for row in read_rows(folder / "data" / "held_out_prompts.jsonl") for _ in range(BEST_OF)]
    if not path.is_file():
        from metaalign_rl import runtime
        from metaalign_rl.core.dataflow import Sampling
        from metaalign_rl.pipeline.context import RunContext

        with runtime.connect(config), RunContext(config) as context:
            write_json(path, context.answer(folder / "sft", rows, Sampling(1.0, config.rollout.max_new_tokens)))
    return judge_all(rows, read_json(path))


def on_policy(folder: Path, drawn: Sequence[JudgedResponse]) -> dict[str, Figures]:
    """Measure every model and mode on the sampled answers; also no reward model, and the checks."""
    values = model_values(folder, drawn) | {"gold": [float(found.verdict.strict is True) for found in drawn]}
    figures = {name: {"pairs drawn": pair_accuracy(drawn, one), **best_of(drawn, one)} for name, one in values.items()}
    return figures | {"first": best_of(drawn, [0.0] * len(drawn))}  # equal values: the first answer wins


def model_values(folder: Path, drawn: Sequence[JudgedResponse]) -> dict[str, list[float]]:
    """Score the answers with each model in each of its modes: the logarithm of `reward.combine`."""
    from reward import Scorer
    from reward.score import log_combine

    rows: list[Row] = [replace(found.row, response=found.answer) for found in drawn]
    values = {}
    for model in (folder / "reward", *(folder / "controls" / control for control in CONTROLS)):
        seen = apply_view(rows, view_of(model.name))
        scores = Scorer.from_pretrained(model, dtype="float32").score(seen)
        for mode in modes_of(model.name):
            name = model.name if model.name in CONTROLS else mode
            values[name] = [log_combine(score, row, mode) for score, row in zip(scores, seen, strict=True)]
    return values


def pair_accuracy(drawn: Sequence[JudgedResponse], values: Sequence[float]) -> float:
    """Return how often the good answer of a pair has the higher value, averaged over the prompts that have both.

    A good answer is strict: it follows neither the losing tier nor a distractor.
    """
    shares = []
    for group in _groups(drawn):
        good, bad = (
            [values[i] for i in group if (drawn[i].verdict.strict is True) is wanted] for wanted in (True, False)
        )
        if good and bad:
            shares.append(fmean(one > other for one in good for other in bad))
    return fmean(shares)


def best_of(drawn: Sequence[JudgedResponse], values: Sequence[float]) -> Figures:
    """Return the gold metrics of the answers with the highest value, one per prompt."""
    chosen = [drawn[max(group, key=values.__getitem__)] for group in _groups(drawn)]
    return {f"best of {BEST_OF}, {name}": value for name, value in headline(summary(chosen)).items()}


def _groups(drawn: Sequence[JudgedResponse]) -> list[range]:
    return [range(start, start + BEST_OF) for start in range(0, len(drawn), BEST_OF)]


if __name__ == "__main__":
    sys.exit(main())
