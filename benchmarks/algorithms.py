"""The PPO stage's algorithms and options beside each other, from one SFT policy and one reward model.

    python benchmarks/algorithms.py --run runs/quickstart --json benchmarks/results/algorithms.json
    python benchmarks/algorithms.py --run runs/quickstart --json OUT ppo grpo --seeds 0 1 --parallel 2
    python benchmarks/algorithms.py --json benchmarks/results/algorithms.json --table    # as Markdown; runs nothing

A finished run gives its data, SFT policy, reward model and settings; a variant changes settings of the PPO stage alone
and is evaluated on the run's held-out rows. A seed is of PPO: which rows it draws, and in what order they are learned.
With `--parallel 2` two variants run at a time, each on one CPU: seconds compare only with others of the same call. What
is measured already is not measured again; what was interrupted goes on where it was (`--root` keeps it).

Written of each seed: `following`, `conflict` and `distractor`, sampled at temperature 1 and `_greedy`; `seconds` of the
PPO stage; `kl`, the mean of the last quarter of the steps in nats an answer, and under adaptive KL the `kl_target`.
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

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this file is run as a script

from benchmarks.run import machine
from metaalign_rl.config.loader import load
from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.files import read_json, read_jsonl, write_json

# By name what is changed in the run's settings.
VARIANTS: dict[str, list[str]] = {
    "ppo": ["ppo.algorithm=ppo"],
    "rloo": ["ppo.algorithm=rloo"],
    "reinforce++": ["ppo.algorithm=reinforce++"],
    "grpo": ["ppo.algorithm=grpo"],
    "per_tier": ["ppo.normalize_per_tier=true"],
    "flips": ["ppo.flips=true"],
    # About half of the KL that the quickstart comes to; a horizon of five of its batches.
    "adaptive_kl": ["ppo.kl=adaptive", "ppo.kl_target=0.5", "ppo.kl_horizon=2560"],
}
SHARED = ("data", "sft", "reward")  # of the run; linked, never written to
FIGURES = ("following", "conflict", "distractor", "following_greedy", "conflict_greedy", "distractor_greedy")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What every variant starts from, and where it goes."""

    run: RunFolder
    root: Path
    parallel: int
    words: Sequence[str]  # further settings, of all variants

    def settings(self, name: str, seed: int) -> list[str]:
        """The settings of one variant's run."""
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
    """The figures of a finished run."""
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
    """Measure what is not measured yet, and write the results after each."""
    made = {"run": bench.run.root.name, "words": list(bench.words), "parallel": bench.parallel}
    results: dict[str, Any] = read_json(output) if output.is_file() else {**made, "variants": {}}
    if {key: results[key] for key in made} != made:
        raise SystemExit(f"{output} was measured from another run or with other words; give another --json")
    lock = Lock()

    def one(name: str, seed: int) -> None:
        found = bench.measure(name, seed)
        with lock:
            entry = results["variants"].setdefault(name, {"settings": VARIANTS[name], "seeds": {}})
            entry["seeds"][str(seed)] = found
            write_json(output, results | {"machine": machine(), "command": "python benchmarks/algorithms.py"})
            print(f"{name} {seed}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)

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
    """The results as lines of Markdown."""
    columns = ["seeds", *(name.replace("_", " ") for name in FIGURES), "KL (target), nats an answer", "seconds"]
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
    """The mean, and with several the least and the most."""
    mean, least, most = (f"{value:.{digits}f}" for value in (fmean(found), min(found), max(found)))
    return f"{mean} ({least}–{most})" if len(found) > 1 else mean


def main() -> int:
    """Measure what is asked for and not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(VARIANTS)}; all where none is given")
    parser.add_argument("--run", type=Path, help="the folder of a finished run")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--root", type=Path, default=Path("runs/algorithms"), help="where the variants' runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--parallel", type=int, default=1, help="variants at a time; above 1 each has one CPU")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="settings of all variants, for a trial"
    )
    parser.add_argument("--table", action="store_true", help="only print the table of what is measured")
    args = parser.parse_args()
    if unknown := set(args.names) - set(VARIANTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    if not args.table:
        measure(bench_of(parser, args), args.names or list(VARIANTS), args.seeds, args.json)
    print("\n".join(table(read_json(args.json))))
    return 0


def bench_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Bench:
    """What to start from; an error of the command line where it is not there."""
    if args.run is None:
        parser.error("--run: give the folder of a finished run, such as runs/quickstart")
    run = RunFolder(args.run)
    for path in (run.config, *(run.root / shared for shared in SHARED)):
        if not path.exists():
            parser.error(f"--run: {path} is not there; give the folder of a finished run, such as runs/quickstart")
    return Bench(run, args.root.absolute(), args.parallel, args.set)


if __name__ == "__main__":
    sys.exit(main())
