"""`docs/baselines.md` and its curves from the results: `python -m benchmarks.baselines_page`."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.run import RESULTS
from metaalign_rl.core.files import read_json, write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
COMPARED = ("following", "conflict")
COLUMNS = ("following", "conflict", "distractor", "following_greedy", "conflict_greedy")
NOT_RIVALS = ("ppo", "sft_clean", "ppo_best_of_8")
VARIANTS = ("mode_tier", "mode_composed", "per_tier", "flips")
WHY = {  # PPO is not ahead of it
    "best_of_8": "It draws eight answers for each one that it gives, and the reward model that PPO is trained with "
    "chooses: it comes as far as that model's judgement goes. PPO puts most of the choice into the weights and gives "
    "its first answer, at an eighth of the cost; with as many answers to choose from it is `ppo_best_of_8`.",
    "dpo_nll": "Its loss holds the likelihood of some 33,000 answers that all follow. The built-in world gives such "
    "pairs, people's preferences seldom do: like `sft_clean` it learns from right demonstrations; PPO never sees any.",
    "mode_tier": "Both scores come from one model; on the 33,280 rollouts of one run they agree, at 0.5, on 97 %.",
    "per_tier": "The tiers' rewards have much the same spread here, 0.29 in the system's and 0.27 in the user's over "
    "one run, so dividing by it changes little.",
    "flips": "About 40 of a step's 128 prompts are conflicts without it, in whatever order they come.",
}
COLORS = ("#2f6fde", "#d9822b", "#188150", "#9a4fc4", "#c43b3b", "#17899b", "#7a7a2a", "#5d6778")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 360, 40, 190, 12, 28

HEAD = """# Baselines and ablations

Every policy but `sft_clean` starts from the SFT policy and the reward model of one quickstart a seed. All are evaluated
on the same held-out rows by the rows' own programs; what draws answers to train on draws as many as PPO. Figures are
means over the seeds, the lowest and highest in brackets; answers are sampled at temperature 1 unless the column says
greedy. Conflict and distractor are strict: the losing tier, or the distractor, is not followed.

`{command}` measured them ({machine}); with names behind it, it measures these alone.
`python -m benchmarks.baselines_page` wrote this page. Two runs of one seed differ too, by 0.02 to 0.05, since the order
in which answers finish depends on timing.

The tuning was not equal. PPO's settings were chosen over many runs on held-out rows as these; DPO's from three, two of
them at a third of the steps, by their figures on seed 0's rows; the others had none. Better ones may lift a rival.
"""
AHEAD = """## Is PPO with the conditioned reward ahead?

Ahead: its worst seed is above the other's best. In brackets the mean difference over the seeds, and the least and most
where that says more; in each seed both start from one SFT policy and one reward model. Three seeds say little of small
differences. The reasons given are readings of the figures; none was tested by itself.
"""


def main() -> None:
    """Write the page and its drawing."""
    results = read_json(RESULTS / "baselines.json")
    found = {name: entry for name, entry in results["baselines"].items() if entry["seeds"]}
    parts = [HEAD.format(**results), *filter(None, [results.get("how")]), table(found), *verdicts(found)]
    parts.append("## Gold over training\n\n![gold by step](baselines.svg)\n")
    write_text(DOCS / "baselines.md", "\n".join(parts))
    write_text(DOCS / "baselines.svg", drawing(curves(found)))


def values(entry: dict[str, Any], figure: str) -> list[float]:
    """A figure of every seed that has it."""
    return [seed[figure] for seed in entry["seeds"].values() if figure in seed]


def table(found: dict[str, Any]) -> str:
    """One line a baseline."""
    lines = [f"| | what | seeds | {' | '.join(name.replace('_', ' ') for name in COLUMNS)} |", "|---" * 8 + "|"]
    for name, entry in found.items():
        cells = [spread(values(entry, figure)) for figure in COLUMNS]
        lines.append(f"| `{name}` | {entry['meaning']} | {len(entry['seeds'])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(found: list[float]) -> str:
    return f"{fmean(found):.3f} ({min(found):.3f}–{max(found):.3f})" if found else "–"


def verdicts(found: dict[str, Any]) -> Iterator[str]:
    """Whether PPO is ahead of each rival, and of its own variants, by more than the spread over seeds, said plainly."""
    rivals = [name for name in found if name not in (*NOT_RIVALS, *VARIANTS)]
    variants = [name for name in found if name in VARIANTS]
    yield AHEAD
    yield _compared(found, rivals)
    if variants:
        yield "Beside its own variants, whose rewards read the meta-prompt as well:\n"
        yield _compared(found, variants)


def _compared(found: dict[str, Any], names: list[str]) -> str:
    lines = []
    for name in names:
        said = [verdict(found["ppo"], found[name], figure) for figure in COMPARED]
        why = "" if all(one.startswith("ahead") for one in said) else WHY.get(name, "")
        lines.append(f"- `{name}`: {'; '.join(said)}. {why}".rstrip())
    return "\n".join(lines) + "\n"


def verdict(ours: dict[str, Any], theirs: dict[str, Any], figure: str) -> str:
    seeds = sorted(ours["seeds"].keys() & theirs["seeds"].keys())
    apart = [ours["seeds"][seed][figure] - theirs["seeds"][seed][figure] for seed in seeds]
    said = f"on {figure} ({fmean(apart):+.3f}"
    if len(seeds) < 2:
        return f"one seed only {said})"
    if min(values(ours, figure)) > max(values(theirs, figure)):
        return f"ahead {said})"
    if max(values(ours, figure)) < min(values(theirs, figure)):
        return f"**behind** {said})"
    if min(apart) > 0:
        return f"ahead in every seed {said}; {min(apart):+.3f} to {max(apart):+.3f}), though the ranges overlap"
    if max(apart) < 0:
        return f"**behind** in every seed {said}; {min(apart):+.3f} to {max(apart):+.3f}), though the ranges overlap"
    return f"**not apart** {said}; {min(apart):+.3f} to {max(apart):+.3f})"


def curves(found: dict[str, Any]) -> dict[str, list[float]]:
    """The mean gold over the seeds by step, of each baseline that is trained by PPO."""
    means = {}
    for name, entry in found.items():
        runs = [seed["curves"]["gold"] for seed in entry["seeds"].values() if "curves" in seed]
        if runs:
            means[name] = [fmean(step) for step in zip(*runs, strict=True)]
    return means


def drawing(lines: dict[str, list[float]]) -> str:
    """The curves as an SVG: share of the step's answers that follow, by step."""
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
