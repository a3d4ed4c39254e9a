"""Write `docs/baselines.md` and its chart from the results of `benchmarks.baselines`.

python -m benchmarks.baselines_page
"""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from benchmarks.about import RESULTS
from benchmarks.baselines import BASELINES, CONFIG
from metaalign_rl.core.files import read_json, write_text

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
COMPARED = ("following", "conflict")
COLUMNS = ("following", "conflict", "distractor", "following_greedy", "conflict_greedy")
NOT_RIVALS = ("ppo", "sft_clean", "ppo_best_of_8")
VARIANTS = ("mode_tier", "mode_composed", "per_tier", "flips")
WHY = {  # shown where PPO is not ahead
    "best_of_8": "It samples eight responses and returns the one that PPO's reward model selects, so that model "
    "limits it. PPO learns most of this selection. It returns its first response, at an eighth of the cost. "
    "`ppo_best_of_8` is PPO with as many responses to choose from.",
    "dpo_nll": "Its loss contains the likelihood of about 33,000 responses that all follow. The built-in world has "
    "such pairs. Human preference data rarely has them. Like `sft_clean`, it learns from correct demonstrations. PPO "
    "never sees any.",
    "mode_tier": "Both scores come from one model. On the 33,280 rollouts of one run, with the threshold 0.5, they "
    "agree on 97%.",
    "per_tier": "The rewards of the two tiers have a similar spread here: 0.29 for system and 0.27 for user over one "
    "run. So dividing by the spread changes little.",
    "flips": "Without this setting, about 40 of the 128 prompts of a step are also conflicts, in no special order.",
}
COLORS = ("#2f6fde", "#d9822b", "#188150", "#9a4fc4", "#c43b3b", "#17899b", "#7a7a2a", "#5d6778")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 360, 40, 190, 12, 28

HEAD = """# Baselines and ablations

<!-- `python -m benchmarks.baselines_page` writes this page. -->

This page compares PPO with the preference-conditioned reward to other methods and to variants of PPO. All results are
from the built-in world and the small model of the quickstart.

## Methods

For each seed, one quickstart run gives the SFT policy and the reward model. Every method except `sft_clean` starts from
them. Methods that train on sampled responses sample as many as PPO.
"""
RESULTS_HEAD = """## Results

All policies are evaluated on the same held-out rows by the checks of these rows. Values are means over the seeds, with
the lowest and the highest in brackets. Responses are sampled at temperature 1, except in the columns marked greedy.
`conflict` and `distractor` are strict: the losing tier, or the distractor, must not be followed
([evaluation.md](evaluation.md) defines all columns).
"""
MEASURED = """## How it was measured

- The command was `{command}` on {machine}.
  To run only some methods, add their names.
{config_line}
- Two runs with the same seed differ by 0.02 to 0.05, because the order in which responses finish depends on timing.
- The tuning was not equal. PPO's settings were chosen over many runs on held-out rows like these. DPO's settings were
  chosen from three, by their results on the rows of seed 0. Two of the three ran for a third of the steps. The other
  methods were not tuned. Better settings may improve a competitor.
"""
SETTINGS = (("reward", "learning_rate"), ("data", "pairs"))  # settings that changed since some results
CHANGED = """- The runs used an earlier [{config}](../{config}), with
  {changes}.
  So `ppo` is an earlier quickstart, not the shipped one."""
SAME = "- The runs used the shipped config."
# The note `how` of the results, reworded.
HOW = """- The results come from several calls. Each process had one CPU (`cluster.cpus=1`) and its own `--output`. The
  files were merged. For seed 0, the quickstart (`sft`, `ppo`), `sft_clean`, `best_of_8` and `sft_best_of_8` had two
  CPUs.
- `dpo` and `ppo_best_of_8` were added while the others were running. For seeds 0 and 1, `dpo_nll` ran under the name
  `dpo`, with the same settings.
- A first setting of DPO (learning rate 3e-4, beta 0.1) broke the policy (following 0.233 on seed 0) and was replaced.
"""
AHEAD = """## Is PPO with the preference-conditioned reward ahead?

The tables compare `ppo` with each of the other policies. In each seed both start from the same SFT policy and reward
model.

- **ahead**: the worst seed of `ppo` is above the best seed of the other. **behind**: the opposite.
- **in every seed**: it is ahead or behind in every seed, but the ranges overlap.
- **undecided**: neither is ahead in every seed.

Each cell has the mean difference over the seeds. If the ranges overlap, it also has the smallest and the largest
difference. Three seeds say little about small differences. The remarks are interpretations; none of them was tested
separately.
"""


def main() -> None:
    """Write the page and its chart."""
    results = read_json(RESULTS / "baselines.json")
    found = {name: entry for name, entry in results["baselines"].items() if entry["seeds"]}
    chart = "## Gold reward during training\n\n![Share of sampled responses that follow, by step](baselines.svg)\n"
    parts = [HEAD, meanings(found), RESULTS_HEAD, table(found), *verdicts(found), chart, measured(results)]
    write_text(DOCS / "baselines.md", "\n".join(parts))
    write_text(DOCS / "baselines.svg", drawing(curves(found)))


def measured(results: dict[str, Any]) -> str:
    """Say how the results were measured, and where the shipped config differs."""
    then, now = (yaml.safe_load(text) for text in (results["config"], (ROOT / CONFIG).read_text("utf-8")))
    changes = [
        f"`{part}.{name}` {before:g} (now {after:g})"
        for part, name in SETTINGS
        if (before := float(then[part][name])) != (after := float(now[part][name]))
    ]
    line = CHANGED.format(changes=" and ".join(changes), config=CONFIG) if changes else SAME
    return MEASURED.format(**results, config_line=line) + (HOW if results.get("how") else "")


def meanings(found: dict[str, Any]) -> str:
    """A table of what each baseline is."""
    lines = ["| name | what it is | seeds |", "|---|---|---|"]
    lines += [f"| `{name}` | {BASELINES[name].meaning} | {len(entry['seeds'])} |" for name, entry in found.items()]
    return "\n".join(lines) + "\n"


def values(entry: dict[str, Any], figure: str) -> list[float]:
    """Return a metric of every seed that has it."""
    return [seed[figure] for seed in entry["seeds"].values() if figure in seed]


def table(found: dict[str, Any]) -> str:
    """A table of the results, one line per baseline."""
    lines = [f"| name | {' | '.join(name.replace('_', ' ') for name in COLUMNS)} |", "|---" * 6 + "|"]
    for name, entry in found.items():
        lines.append(f"| `{name}` | {' | '.join(spread(values(entry, figure)) for figure in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def spread(found: list[float]) -> str:
    """The mean, with the lowest and the highest in brackets."""
    return f"{fmean(found):.3f} ({min(found):.3f}–{max(found):.3f})" if found else "–"


def verdicts(found: dict[str, Any]) -> Iterator[str]:
    """Say whether PPO is ahead of each competitor and of its own variants by more than the spread over the seeds."""
    rivals = [name for name in found if name not in (*NOT_RIVALS, *VARIANTS)]
    variants = [name for name in found if name in VARIANTS]
    yield AHEAD
    yield _compared(found, rivals)
    if variants:
        yield "The next table compares `ppo` with its own variants, whose rewards also read the meta-prompt:\n"
        yield _compared(found, variants)


def _compared(found: dict[str, Any], names: list[str]) -> str:
    lines = [f"| `ppo` compared with | {' | '.join(COMPARED)} | remark |", "|---" * (2 + len(COMPARED)) + "|"]
    for name in names:
        said = [verdict(found["ppo"], found[name], figure) for figure in COMPARED]
        why = "" if all(one.startswith("ahead") for one in said) else WHY.get(name, "")
        lines.append(f"| `{name}` | {' | '.join(said)} | {why} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def verdict(ours: dict[str, Any], theirs: dict[str, Any], figure: str) -> str:
    """Say whether ours is ahead of theirs on a metric, and by how much."""
    seeds = sorted(ours["seeds"].keys() & theirs["seeds"].keys())
    apart = [ours["seeds"][seed][figure] - theirs["seeds"][seed][figure] for seed in seeds]
    mean, extent = f"{fmean(apart):+.3f}", f"{min(apart):+.3f} to {max(apart):+.3f}"
    if len(seeds) < 2:
        return f"one seed only ({mean})"
    if min(values(ours, figure)) > max(values(theirs, figure)):
        return f"ahead ({mean})"
    if max(values(ours, figure)) < min(values(theirs, figure)):
        return f"**behind** ({mean})"
    if min(apart) > 0:
        return f"ahead in every seed ({mean}; {extent})"
    if max(apart) < 0:
        return f"**behind in every seed** ({mean}; {extent})"
    return f"**undecided** ({mean}; {extent})"


def curves(found: dict[str, Any]) -> dict[str, list[float]]:
    """Return the gold reward by step, averaged over the seeds, of each baseline that PPO trains."""
    means = {}
    for name, entry in found.items():
        runs = [seed["curves"]["gold"] for seed in entry["seeds"].values() if "curves" in seed]
        if runs:
            means[name] = [fmean(step) for step in zip(*runs, strict=True)]
    return means


def drawing(lines: dict[str, list[float]]) -> str:
    """Draw the curves as an SVG: the share of sampled responses that follow, by step."""
    steps = max(map(len, lines.values()), default=1)
    low = min((min(line) for line in lines.values()), default=0.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" ',
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]

    def place(step: int, value: float) -> tuple[float, float]:
        x = LEFT + step / max(1, steps - 1) * (WIDTH - LEFT - RIGHT)
        return round(x, 1), round(TOP + (1 - value) / (1 - low) * (HEIGHT - TOP - BOTTOM), 1)

    for tick in range(11):
        if tick / 10 >= low:
            y = place(0, tick / 10)[1]
            parts.append(
                f'<path d="M{LEFT},{y}H{WIDTH - RIGHT}" stroke="#dfe3ea"/><text x="8" y="{y + 4}">{tick / 10}</text>'
            )
    for number, (name, line) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        points = " ".join("{},{}".format(*place(step, value)) for step, value in enumerate(line))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        y = TOP + 14 + 18 * number
        parts.append(f'<text x="{WIDTH - RIGHT + 14}" y="{y}" fill="{color}">{escape(name)} {line[-1]:.3f}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT - 70}" y="{HEIGHT - 8}">{steps} steps</text></svg>')
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
