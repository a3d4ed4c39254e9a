"""Baselines and ablations beside PPO with the conditioned reward: the same rows, held-out rows and number of answers.

    python -m benchmarks.baselines                          # every one, seeds 0 1 2: some hours on 2 cores
    python -m benchmarks.baselines ppo blind --seeds 0      # two of them

Each starts from the data, SFT policy and reward model of one quickstart a seed (`--root` keeps them). What is measured
already, by the same command, is not measured again. Writes `benchmarks/results/baselines.json`.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.run import RESULTS, machine
from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.files import read_json, read_jsonl, write_json, write_jsonl
from metaalign_rl.core.rows import read_rows

CONFIG = "configs/quickstart.yaml"
BEST_OF = 8
Figures = dict[str, float]


@dataclass(frozen=True)
class Base:
    """A finished quickstart, which the others start from, and the folder for what they make of it."""

    folder: Path
    seed: int
    root: Path

    def words(self, name: str) -> list[str]:
        """Settings of a run that goes on from the base's SFT policy and reward model."""
        return [
            f"run.seed={self.seed}", f"run.name={name}-{self.seed}", f"run.root={self.root}",
            f"model.path={self.folder / 'sft'}", f"reward.path={self.folder / 'reward'}",
        ]  # fmt: skip

    def path(self, name: str) -> Path:
        """The folder of a run of that name."""
        return self.root / f"{name}-{self.seed}"


@dataclass(frozen=True)
class Baseline:
    """One way to make a policy: what it is, and the figures that it comes to."""

    meaning: str
    measure: Callable[[Base], dict[str, Any]]


def command(*words: str) -> None:
    """Run `metaalign-rl` with these words."""
    subprocess.run([sys.executable, "-m", "metaalign_rl", *words], check=True)


def headline(figures: dict[str, Any], suffix: str = "") -> Figures:
    """The figures that are compared."""
    return {f"{name}{suffix}": figures[name] for name in ("following", "conflict", "distractor")}


def evaluated(model: Path, base: Base) -> dict[str, Any]:
    """A checkpoint's figures on the base's held-out rows, sampled and greedy."""
    found: dict[str, Any] = {}
    for suffix, temperature in (("", 1.0), ("_greedy", 0.0)):
        output = model.parent / f"{model.name}-evaluation{suffix}"
        data = base.folder / "data" / "held_out_prompts.jsonl"
        command("evaluate", str(model), "--data", str(data), "--output", str(output), "--temperature", str(temperature))
        found |= headline(read_json(output / "figures.json"), suffix)
    return found


def finished(folder: Path) -> dict[str, Any]:
    """The figures of a run's policy, and its gold and proxy by step."""
    figures = read_json(folder / "evaluation" / "figures.json")
    steps = [line for _, line in read_jsonl(folder / "metrics.jsonl")]
    curves = {name: [round(step[name], 4) for step in steps if name in step] for name in ("gold", "proxy", "kl")}
    return {**headline(figures["ppo_sampled"]), **headline(figures["ppo_greedy"], "_greedy"), "curves": curves}


def ppo(name: str, *overrides: str) -> Callable[[Base], dict[str, Any]]:
    """PPO from the base's SFT policy with some settings changed."""

    def measure(base: Base) -> dict[str, Any]:
        command("run", CONFIG, *base.words(name), "run.stages=[data, ppo, evaluate]", *overrides)
        return finished(base.path(name))

    return measure


def quickstart(base: Base) -> dict[str, Any]:
    """The base run's own PPO."""
    return finished(base.folder)


def blind(base: Base) -> dict[str, Any]:
    """PPO whose reward never sees the meta-prompt."""
    control = base.folder / "controls" / "preference_blind"
    return ppo("blind", f"reward.path={control}", "reward.view=preference_blind")(base)


def sft(base: Base) -> dict[str, Any]:
    """The policy that all others start from."""
    figures = read_json(base.folder / "evaluation" / "figures.json")
    return headline(figures["sft_sampled"]) | headline(figures["sft_greedy"], "_greedy")


def sft_clean(base: Base) -> dict[str, Any]:
    """SFT on demonstrations that all follow: what perfect labels, as many, would give."""
    words = [word for word in base.words("clean") if not word.startswith("model.path")]
    command("run", CONFIG, *words, "run.stages=[data, sft]", "data.follow_rate=1.0")
    return evaluated(base.path("clean") / "sft", base)


def best_of(policy: str) -> Callable[[Base], dict[str, Any]]:
    """The best of 8 answers of one of the base's policies to each held-out row by the reward model, at inference."""

    def measure(base: Base) -> dict[str, Any]:
        from metaalign_rl.evaluation.gold_metrics import judge_all, summary

        rows = list(read_rows(base.folder / "data" / "held_out_prompts.jsonl"))
        return headline(summary(judge_all(rows, best_answers(base, policy, rows))))

    return measure


def best_answers(base: Base, policy: str, rows: Sequence[Row]) -> list[str]:
    """To each row the one of a policy's answers that the reward model likes best."""
    from metaalign_rl.core.dataflow import Sampling
    from metaalign_rl.pipeline.context import RunContext
    from metaalign_rl.runtime import ray_session
    from reward import Scorer
    from reward.score import log_combine

    config = loader.load(Config, Path(CONFIG), base.words("best"))
    asked = [row for row in rows for _ in range(BEST_OF)]
    with ray_session.connect(config), RunContext(config) as context:
        answers = context.answer(base.folder / policy, asked, Sampling(1.0, config.rollout.max_new_tokens))
    scorer = Scorer.from_pretrained(base.folder / "reward", dtype="float32")
    scores = scorer.score([replace(row, response=answer) for row, answer in zip(asked, answers, strict=True)])
    values = [log_combine(score, row, config.reward.mode) for score, row in zip(scores, asked, strict=True)]
    starts = range(0, len(asked), BEST_OF)
    return [answers[max(range(start, start + BEST_OF), key=values.__getitem__)] for start in starts]


def sft_best_of(base: Base) -> dict[str, Any]:
    """SFT on the best of 8 answers to as many training prompts as PPO's answers would do for."""
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
    """The mean of two policies' weights, each trained by PPO on one tier's rows alone (Personalized Soups' idea)."""
    half = f"ppo.steps={loader.load(Config, Path(CONFIG), []).ppo.steps // 2}"
    for tier in ("system", "user"):
        words = [*base.words(f"soup-{tier}"), "run.stages=[data, ppo]", f"ppo.sampler={{{tier}: 1.0}}", half]
        command("run", CONFIG, *words)
    return evaluated(
        merge([base.path(f"soup-{tier}") / "policy" for tier in ("system", "user")], base.path("soup")), base
    )


def dpo(name: str, *options: str) -> Callable[[Base], dict[str, Any]]:
    """DPO from the SFT policy on the pairs that the reward model was trained on."""

    def measure(base: Base) -> dict[str, Any]:
        output = base.path(name) / "policy"
        pairs = [str(base.folder / "data" / file) for file in ("pairs.jsonl", "on_policy_pairs.jsonl")]
        words = [str(base.folder / "sft"), str(output), *pairs, "--seed", str(base.seed), *options]
        subprocess.run([sys.executable, "-m", "benchmarks.dpo", *words], check=True)
        return evaluated(output, base)

    return measure


def merge(policies: Sequence[Path], output: Path) -> Path:
    """Write a checkpoint whose weights are the policies' mean."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(policies[0], output, dirs_exist_ok=True)
    tensors = [load_file(policy / "model.safetensors") for policy in policies]
    mean = {name: sum(part[name] for part in tensors) / len(tensors) for name in tensors[0]}
    save_file(mean, output / "model.safetensors", metadata={"format": "pt"})
    return output


BASELINES = {
    "sft": Baseline("SFT on noisy demonstrations, where all but sft_clean start", sft),
    "sft_clean": Baseline("SFT on demonstrations that all follow: an upper reference, not a rival", sft_clean),
    "best_of_8": Baseline(
        "the SFT policy's best of 8 by the reward model, at inference (8 times the cost)", best_of("sft")
    ),
    "ppo_best_of_8": Baseline("the same for PPO's policy", best_of("policy")),
    "sft_best_of_8": Baseline("SFT on the best of 8, as many answers as PPO draws", sft_best_of),
    "ppo": Baseline("PPO with the conditioned reward, mode overall: the quickstart", quickstart),
    "blind": Baseline("PPO with a reward that never sees the meta-prompt", blind),
    "mode_tier": Baseline("PPO, reward.mode=tier", ppo("tier", "reward.mode=tier")),
    "mode_composed": Baseline("PPO, reward.mode=composed", ppo("composed", "reward.mode=composed")),
    "per_tier": Baseline("PPO, rewards normalised in each tier", ppo("per-tier", "ppo.normalize_per_tier=true")),
    "flips": Baseline("PPO, both sides of a conflict's flip in one step", ppo("flips", "ppo.flips=true")),
    "dpo": Baseline("DPO on the pairs that the reward model was trained on", dpo("dpo")),
    "dpo_nll": Baseline(
        "the same with the chosen answers' likelihood in the loss: SFT on some 33,000 answers that all follow",
        dpo("dpo-nll", "--nll-weight", "1", "--learning-rate", "1e-4"),
    ),
    "soup": Baseline("the mean of a policy for each tier, half of the steps each", soup),
}


def main() -> int:
    """Measure what is asked for and not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BASELINES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path("runs/baselines"), help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=RESULTS / "baselines.json")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BASELINES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(BASELINES)}")
    measure(args.names or list(BASELINES), args.seeds, args.root.absolute(), args.output)
    return 0


def measure(names: Iterable[str], seeds: Iterable[int], root: Path, output: Path) -> None:
    """Measure each baseline for each seed and write the results after each."""
    config = loader.dump(loader.load(Config, Path(CONFIG), []))
    results = read_json(output) if output.is_file() else {"config": config, "baselines": {}}
    if results["config"] != config:
        raise SystemExit(f"{output} was measured with another {CONFIG}; move it away, or give another --output")
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
    """The quickstart of a seed, run where it was not."""
    command("run", CONFIG, f"run.seed={seed}", f"run.name=base-{seed}", f"run.root={root}")
    return Base(root / f"base-{seed}", seed, root)


if __name__ == "__main__":
    sys.exit(main())
