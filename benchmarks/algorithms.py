"""Compare the algorithms and options of the PPO stage, starting from one SFT policy and one reward model.

    python -m benchmarks.algorithms --run runs/quickstart --json benchmarks/results/algorithms.json
    python -m benchmarks.algorithms --run runs/quickstart --json OUT ppo grpo --seeds 0 1 --parallel 2
    python -m benchmarks.algorithms --json benchmarks/results/algorithms.json --table    # print Markdown, run nothing

A finished run gives the data, the SFT policy, the reward model and the settings. A variant changes only settings of the
PPO stage and is evaluated on the run's held-out rows. The seed decides which rows PPO samples and in what order it
learns from them. With `--parallel 2` two variants run at a time, each on one CPU, so compare seconds only within one
call. Results in the output file are not measured again. Interrupted runs resume; they are kept under `--root`.

Results per seed:
    following, conflict, distractor: sampled at temperature 1, and with the suffix `_greedy` decoded greedily
    seconds: duration of the PPO stage
    kl: the mean over the last quarter of the steps, in nats per response
    kl_target: only with adaptive KL
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

from benchmarks.about import machine
from metaalign_rl.config.loader import load
from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.arguments import path
from metaalign_rl.core.files import read_json, read_jsonl, write_json

# The settings that each variant changes.
VARIANTS: dict[str, list[str]] = {
    "ppo": ["ppo.algorithm=ppo"],
    "rloo": ["ppo.algorithm=rloo"],
    "reinforce++": ["ppo.algorithm=reinforce++"],
    "grpo": ["ppo.algorithm=grpo"],
    "per_tier": ["ppo.normalize_per_tier=true"],
    "flips": ["ppo.flips=true"],
    # About half of the KL that the quickstart reaches, and a horizon of five of its batches.
    "adaptive_kl": ["ppo.kl=adaptive", "ppo.kl_target=0.5", "ppo.kl_horizon=2560"],
}
SHARED = ("data", "sft", "reward")  # folders of the run; linked, never written to
FIGURES = ("following", "conflict", "distractor", "following_greedy", "conflict_greedy", "distractor_greedy")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """The run that every variant starts from, and the folder of the variants' runs."""

    run: RunFolder
    root: Path
    parallel: int
    words: Sequence[str]  # settings of all variants

    def settings(self, name: str, seed: int) -> list[str]:
        """Return the settings of one variant's run."""
        words = ["ppo.algorithm=ppo", *self.words, *VARIANTS[name]]
        words += ["cluster.cpus=1"] if self.parallel > 1 else []
        named = [f"run.name={name.replace('+', 'p')}-{seed}", f"run.root={self.root}", f"run.seed={seed}"]
        return [*words, *named, "run.stages=[ppo, evaluate]"]

    def measure(self, name: str, seed: int) -> Figures:
        """Train and evaluate a variant."""
        words = self.settings(name, seed)
        config = load(Config, self.run.config, words)
        folder = RunFolder.of(config)
        folder.root.mkdir(parents=True, exist_ok=True)
        for shared in SHARED:
            link = folder.root / shared
            if not link.exists():
                link.symlink_to(self.run.root / shared)
        command = [sys.executable, "-m", "metaalign_rl", "run", str(self.run.config), *words]
        with (folder.root / "output.txt").open("w") as output:
            subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT)
        return measured(folder, config)


def measured(folder: RunFolder, config: Config) -> Figures:
    """Read the metrics of a finished run."""
    found = read_json(folder.evaluation / "figures.json")
    figures: Figures = {}
    for suffix, decoding in (("", "sampled"), ("_greedy", "greedy")):
        of = found[f"ppo_{decoding}"]
        figures |= {f"{name}{suffix}": of[name] for name in ("following", "conflict", "distractor")}
    figures["seconds"] = read_json(folder.stages)["ppo"]["seconds"]
    steps = [line for _, line in read_jsonl(folder.metrics)]
    last = steps[-max(1, len(steps) // 4) :]
    figures["kl"] = fmean(step["kl"] * step["response_tokens"] for step in last)
    return figures | ({"kl_target": config.ppo.kl_target} if config.ppo.kl == "adaptive" else {})


def measure(bench: Bench, names: Sequence[str], seeds: Sequence[int], output: Path) -> None:
    """Measure the variants that have no results yet. Write the results after each."""
    made = {"run": bench.run.root.name, "words": list(bench.words), "parallel": bench.parallel}
    results: dict[str, Any] = read_json(output) if output.is_file() else {**made, "variants": {}}
    if (found := {key: results[key] for key in made}) != made:
        raise SystemExit(f"{output}: expected results of {made}, found {found}; give another --json")
    lock = Lock()

    def one(name: str, seed: int) -> None:
        figures = bench.measure(name, seed)
        with lock:
            entry = results["variants"].setdefault(name, {"settings": VARIANTS[name], "seeds": {}})
            entry["seeds"][str(seed)] = figures
            write_json(output, results | {"machine": machine(), "command": "python -m benchmarks.algorithms"})
            print(f"{name} {seed}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)

    missing = [
        (name, seed)
        for seed in seeds
        for name in names
        if str(seed) not in results["variants"].get(name, {"seeds": {}})["seeds"]
    ]
    with ThreadPoolExecutor(bench.parallel) as pool:
        for done in [pool.submit(one, *job) for job in missing]:
            done.result()


def table(results: dict[str, Any]) -> Iterator[str]:
    """Return the results as lines of a Markdown table."""
    columns = ["seeds", *(name.replace("_", " ") for name in FIGURES), "KL (target), nats per response", "seconds"]
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(FIGURES) + 4) + "|"
    found = results["variants"]
    for name, entry in ((name, found[name]) for name in VARIANTS if name in found):
        seeds = list(entry["seeds"].values())
        cells = [spread([seed[figure] for seed in seeds]) for figure in FIGURES]
        target = f" ({seeds[0]['kl_target']:g})" if "kl_target" in seeds[0] else ""
        cells += [spread([seed["kl"] for seed in seeds], 2) + target, f"{fmean(seed['seconds'] for seed in seeds):.0f}"]
        yield f"| `{name}` | {len(seeds)} | {' | '.join(cells)} |"


def spread(found: Sequence[float], digits: int = 3) -> str:
    """Return the mean; with several values also the lowest and the highest."""
    mean, least, most = (f"{value:.{digits}f}" for value in (fmean(found), min(found), max(found)))
    return f"{mean} ({least}–{most})" if len(found) > 1 else mean


def main() -> int:
    """Measure the requested variants that have no results yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--run", type=path, help="the folder of a finished run")
    parser.add_argument("--json", type=path, required=True, help="the JSON file to write")
    parser.add_argument("--root", type=path, default=Path("runs/algorithms"), help="the folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument(
        "--parallel", type=int, default=1, help="variants at a time; with more than 1, each gets one CPU"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="settings of all variants")
    parser.add_argument("--table", action="store_true", help="only print the table of the results")
    args = parser.parse_args()
    if unknown := set(args.names) - set(VARIANTS):
        parser.error(f"NAME: expected some of {', '.join(VARIANTS)}, found {', '.join(sorted(unknown))}")
    if not args.table:
        measure(bench_of(parser, args), args.names or list(VARIANTS), args.seeds, args.json)
    print("\n".join(table(read_json(args.json))))
    return 0


def bench_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Bench:
    """Return what the variants start from; stop with an error if a part of it is missing."""
    if args.run is None:
        parser.error("--run: expected the folder of a finished run, such as runs/quickstart, found nothing")
    run = RunFolder(args.run)
    for needed in (run.config, *(run.root / shared for shared in SHARED)):
        if not needed.exists():
            parser.error(f"--run: expected the folder of a finished run, such as runs/quickstart; {needed} is missing")
    return Bench(run, args.root.absolute(), args.parallel, args.set)


if __name__ == "__main__":
    sys.exit(main())
