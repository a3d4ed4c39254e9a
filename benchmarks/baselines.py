"""Compare PPO with the conditioned reward to baselines and ablations.

    python -m benchmarks.baselines                          # all of them, seeds 0 1 2: some hours on 2 cores
    python -m benchmarks.baselines ppo blind --seeds 0      # two of them

For each seed, all start from the data, the SFT policy and the reward model of one quickstart run. They use the same
training rows and the same held-out rows. Those that sample responses for training sample as many as PPO. The runs are
kept under `--root`. Results that are already in the output file are not measured again.
Writes `benchmarks/results/baselines.json`.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.about import RESULTS, machine
from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.core.arguments import path
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.files import read_json, read_jsonl, write_json, write_jsonl
from metaalign_rl.core.rows import read_rows

CONFIG = "configs/quickstart.yaml"
CONTROLS = "reward.controls=[preference_blind]"  # the reward model of `blind`
BEST_OF = 8
Figures = dict[str, float]


@dataclass(frozen=True)
class Base:
    """A finished quickstart, from which the baselines start, and the folder for their runs."""

    folder: Path
    seed: int
    root: Path

    def words(self, name: str) -> list[str]:
        """Return the settings of a run that starts from the base's SFT policy and reward model."""
        return [
            f"run.seed={self.seed}", f"run.name={name}-{self.seed}", f"run.root={self.root}",
            f"model.path={self.folder / 'sft'}", f"reward.path={self.folder / 'reward'}",
        ]  # fmt: skip

    def path(self, name: str) -> Path:
        """Return the folder of the run with this name."""
        return self.root / f"{name}-{self.seed}"


@dataclass(frozen=True)
class Baseline:
    """One way to make a policy: what it is, and the function that measures it."""

    meaning: str
    measure: Callable[[Base], dict[str, Any]]


def command(*words: str) -> None:
    """Run `metaalign-rl` with these arguments."""
    subprocess.run([sys.executable, "-m", "metaalign_rl", *words], check=True)


def headline(figures: dict[str, Any], suffix: str = "") -> Figures:
    """Return the compared metrics."""
    return {f"{name}{suffix}": figures[name] for name in ("following", "conflict", "distractor")}


def evaluated(model: Path, base: Base) -> dict[str, Any]:
    """Evaluate a checkpoint on the base's held-out rows, sampled and greedy."""
    found: dict[str, Any] = {}
    for suffix, temperature in (("", 1.0), ("_greedy", 0.0)):
        output = model.parent / f"{model.name}-evaluation{suffix}"
        data = base.folder / "data" / "held_out_prompts.jsonl"
        command("evaluate", str(model), "--data", str(data), "--output", str(output), "--temperature", str(temperature))
        found |= headline(read_json(output / "figures.json"), suffix)
    return found


def finished(folder: Path) -> dict[str, Any]:
    """Return the metrics of a finished run's policy, and its gold, proxy and KL by step."""
    figures = read_json(folder / "evaluation" / "figures.json")
    steps = [line for _, line in read_jsonl(folder / "metrics.jsonl")]
    curves = {name: [round(step[name], 4) for step in steps if name in step] for name in ("gold", "proxy", "kl")}
    return {**headline(figures["ppo_sampled"]), **headline(figures["ppo_greedy"], "_greedy"), "curves": curves}


def ppo(name: str, *overrides: str) -> Callable[[Base], dict[str, Any]]:
    """Return a function that runs PPO from the base's SFT policy with some settings changed."""

    def measure(base: Base) -> dict[str, Any]:
        command("run", CONFIG, *base.words(name), "run.stages=[data, ppo, evaluate]", *overrides)
        return finished(base.path(name))

    return measure


def quickstart(base: Base) -> dict[str, Any]:
    """Return the metrics of the base run's own PPO."""
    return finished(base.folder)


def blind(base: Base) -> dict[str, Any]:
    """Run PPO with a reward model that does not read the meta-prompt."""
    control = base.folder / "controls" / "preference_blind"
    return ppo("blind", f"reward.path={control}", "reward.view=preference_blind")(base)


def sft(base: Base) -> dict[str, Any]:
    """Return the metrics of the SFT policy, from which the others start."""
    figures = read_json(base.folder / "evaluation" / "figures.json")
    return headline(figures["sft_sampled"]) | headline(figures["sft_greedy"], "_greedy")


def sft_clean(base: Base) -> dict[str, Any]:
    """Run SFT on the same number of demonstrations, all of which follow the governing preference."""
    words = [word for word in base.words("clean") if not word.startswith("model.path")]
    command("run", CONFIG, *words, "run.stages=[data, sft]", "data.follow_rate=1.0")
    return evaluated(base.path("clean") / "sft", base)


def best_of(policy: str) -> Callable[[Base], dict[str, Any]]:
    """Return a function that samples 8 answers to each held-out row and keeps the one with the highest reward."""

    def measure(base: Base) -> dict[str, Any]:
        from metaalign_rl.evaluation.gold_metrics import judge_all, summary

        rows = list(read_rows(base.folder / "data" / "held_out_prompts.jsonl"))
        return headline(summary(judge_all(rows, best_answers(base, policy, rows))))

    return measure


def best_answers(base: Base, policy: str, rows: Sequence[Row]) -> list[str]:
    """Sample `BEST_OF` answers to each row; return the one with the highest reward."""
    from metaalign_rl import runtime
    from metaalign_rl.core.dataflow import Sampling
    from metaalign_rl.pipeline.context import RunContext
    from reward import Scorer
    from reward.score import log_combine

    config = loader.load(Config, Path(CONFIG), base.words("best"))
    asked = [row for row in rows for _ in range(BEST_OF)]
    with runtime.connect(config), RunContext(config) as context:
        answers = context.answer(base.folder / policy, asked, Sampling(1.0, config.rollout.max_new_tokens))
    scorer = Scorer.from_pretrained(base.folder / "reward", dtype="float32")
    scores = scorer.score([replace(row, response=answer) for row, answer in zip(asked, answers, strict=True)])
    values = [log_combine(score, row, config.reward.mode) for score, row in zip(scores, asked, strict=True)]
    starts = range(0, len(asked), BEST_OF)
    return [answers[max(range(start, start + BEST_OF), key=values.__getitem__)] for start in starts]


def sft_best_of(base: Base) -> dict[str, Any]:
    """Run SFT on the best of 8 answers to training prompts, with as many answers in all as PPO samples."""
    config = loader.load(Config, Path(CONFIG), [])
    drawn = config.ppo.steps * config.ppo.prompts_per_step * config.ppo.samples_per_prompt
    rows = list(read_rows(base.folder / "data" / "prompts.jsonl"))[: drawn // BEST_OF]
    chosen = [
        replace(row, response=best) for row, best in zip(rows, best_answers(base, "sft", rows), strict=True) if best
    ]
    source = base.path("best-rows")
    write_jsonl(source / "demonstrations.jsonl", (row.to_json() for row in chosen))
    words = [*base.words("rejection"), "run.stages=[data, sft]", "data.source=jsonl", f"data.path={source}"]
    command("run", CONFIG, *words, "sft.learning_rate=5e-4", "sft.epochs=2")
    return evaluated(base.path("rejection") / "sft", base)


def soup(base: Base) -> dict[str, Any]:
    """Average the weights of two policies, each trained by PPO on the rows of one tier (as in Personalized Soups)."""
    half = f"ppo.steps={loader.load(Config, Path(CONFIG), []).ppo.steps // 2}"
    for tier in ("system", "user"):
        words = [*base.words(f"soup-{tier}"), "run.stages=[data, ppo]", f"ppo.sampler={{{tier}: 1.0}}", half]
        command("run", CONFIG, *words)
    return evaluated(
        merge([base.path(f"soup-{tier}") / "policy" for tier in ("system", "user")], base.path("soup")), base
    )


def dpo(name: str, *options: str) -> Callable[[Base], dict[str, Any]]:
    """Return a function that runs DPO from the SFT policy on the reward model's training pairs."""

    def measure(base: Base) -> dict[str, Any]:
        output = base.path(name) / "policy"
        pairs = [str(base.folder / "data" / file) for file in ("pairs.jsonl", "on_policy_pairs.jsonl")]
        words = [str(base.folder / "sft"), str(output), *pairs, "--seed", str(base.seed), *options]
        subprocess.run([sys.executable, "-m", "benchmarks.dpo", *words], check=True)
        return evaluated(output, base)

    return measure


def merge(policies: Sequence[Path], output: Path) -> Path:
    """Write a checkpoint whose weights are the mean of the policies' weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(policies[0], output, dirs_exist_ok=True)
    tensors = [load_file(policy / "model.safetensors") for policy in policies]
    mean = {name: sum(part[name] for part in tensors) / len(tensors) for name in tensors[0]}
    save_file(mean, output / "model.safetensors", metadata={"format": "pt"})
    return output


BASELINES = {
    "sft": Baseline("SFT on noisy demonstrations; all others except `sft_clean` start from it", sft),
    "sft_clean": Baseline(
        "SFT on demonstrations that all follow the governing preference; a reference, not a competitor", sft_clean
    ),
    "best_of_8": Baseline(
        "at inference, the best of 8 responses of the SFT policy by the reward model (8 times the cost)", best_of("sft")
    ),
    "ppo_best_of_8": Baseline("the same for the PPO policy", best_of("policy")),
    "sft_best_of_8": Baseline("SFT on the best of 8 responses, with as many sampled responses as PPO", sft_best_of),
    "ppo": Baseline("PPO with the preference-conditioned reward, `reward.mode=overall`", quickstart),
    "blind": Baseline("PPO with a reward model that does not read the meta-prompt", blind),
    "mode_tier": Baseline("PPO, `reward.mode=tier`", ppo("tier", "reward.mode=tier")),
    "mode_composed": Baseline("PPO, `reward.mode=composed`", ppo("composed", "reward.mode=composed")),
    "per_tier": Baseline("PPO, rewards normalized per tier", ppo("per-tier", "ppo.normalize_per_tier=true")),
    "flips": Baseline("PPO, both sides of a conflict flip pair in one step", ppo("flips", "ppo.flips=true")),
    "dpo": Baseline("DPO on the reward model's training pairs", dpo("dpo")),
    "dpo_nll": Baseline(
        "DPO plus a likelihood term, which is SFT on the about 33,000 chosen responses; all of them follow",
        dpo("dpo-nll", "--nll-weight", "1", "--learning-rate", "1e-4"),
    ),
    "soup": Baseline("one policy per tier, each trained for half of the steps; then the mean of their weights", soup),
}


def main() -> int:
    """Measure the requested baselines that have no results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BASELINES)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--root", type=path, default=Path("runs/baselines"), help="the folder of the runs")
    parser.add_argument("--output", type=path, default=RESULTS / "baselines.json", help="the JSON file to write")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BASELINES):
        parser.error(f"NAME: expected some of {', '.join(BASELINES)}, found {', '.join(sorted(unknown))}")
    measure(args.names or list(BASELINES), args.seeds, args.root.absolute(), args.output)
    return 0


def measure(names: Iterable[str], seeds: Iterable[int], root: Path, output: Path) -> None:
    """Measure each baseline with each seed. Write the results after each."""
    config = loader.dump(loader.load(Config, Path(CONFIG), [CONTROLS]))
    results = read_json(output) if output.is_file() else {"config": config, "baselines": {}}
    if results["config"] != config:
        raise SystemExit(f"{output}: expected results of the current {CONFIG}, found another; give another --output")
    for seed in seeds:
        base = make_base(seed, root)
        for name in names:
            entry = results["baselines"].setdefault(name, {"meaning": BASELINES[name].meaning, "seeds": {}})
            if str(seed) not in entry["seeds"]:
                entry["seeds"][str(seed)] = BASELINES[name].measure(base)
                write_json(output, results | {"machine": machine(), "command": "python -m benchmarks.baselines"})
            found = entry["seeds"][str(seed)]
            print(f"{name} {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items() if isinstance(v, float)))


def make_base(seed: int, root: Path) -> Base:
    """Run the quickstart with a seed, unless it is finished."""
    command("run", CONFIG, f"run.seed={seed}", f"run.name=base-{seed}", f"run.root={root}", CONTROLS)
    return Base(root / f"base-{seed}", seed, root)


if __name__ == "__main__":
    sys.exit(main())
