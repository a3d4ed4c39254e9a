"""Write the tables of `docs/reward-model.md` from the results of `benchmarks.reward_models`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.baselines_page import DOCS, spread, values, verdict
from metaalign_rl.core.files import write_text
from reward.score import MODES

PAGE = DOCS / "reward-model.md"
BEGIN, END = "<!-- benchmarks.reward_models writes from here -->", "<!-- to here -->"
JUDGES = {
    **{mode: f"the model with four labels, scored in mode `{mode}`" for mode in MODES},
    "scalar": "control with one score, trained on the label `overall` only",
    "tier_blind": "control that reads both texts but not which tier each is from",
    "preference_blind": "control that does not read the meta-prompt",
    "first": "no reward model: the first sampled response",
    "gold": "the checks of the rows: the best that a reward model can do",
}
ACCURACY = ("accuracy", "conflict", "distractor", "flips", "tier flips")
WORDING = ("paraphrases, right", "paraphrases, alike", "over-refusal", "refusals")
CALIBRATION = ("ece", "length bias")
LENGTH = "length in the data"  # a property of the pairs, so the same for every model
DRAWN = ("pairs drawn", "best of 8, following", "best of 8, conflict", "best of 8, distractor")
COMPARED = ("accuracy", "conflict", "distractor", "flips", "paraphrases, right", *DRAWN)
LABELS = {"pairs drawn": "sampled pairs"}  # where a metric's name on the page differs from the results
RIVAL = "scalar"

HEAD = """The command was `{command}` on {machine},
with {seeds}. Values are means over the seeds, with the lowest and the highest in brackets. All models of a seed start
from the same SFT policy and train on the same rows in the same order.
"""
SAMPLED = """### Responses sampled from the SFT policy

The SFT policy samples eight responses to each held-out prompt at temperature 1.

- `sampled pairs`: in pairs of a good and a bad response to one prompt, how often the good one has the higher score.
- `best of 8`: the response with the highest score, judged by the checks of the rows.
"""
QUESTION = """### Does scoring by tier help?

The table compares the three modes with `scalar`, which learns only the label `overall`. `overall` shows what the labels
by tier add in training. `tier` and `composed` show what they add when responses are scored.

- **ahead**: the worst seed is above the best seed of `scalar`. **behind**: the opposite.
- **in every seed**: it is ahead or behind in every seed, but the ranges overlap.
- **undecided**: neither is ahead in every seed.

Each cell has the mean difference over the seeds. If the ranges overlap, it also has the smallest and the largest
difference.
"""


def write(results: dict[str, Any], page: Path) -> None:
    """Put the tables between the page's marks.

    Raises:
        SystemExit: the page has no marks.
    """
    head, begin, rest = page.read_text("utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page}: expected the lines {BEGIN!r} and {END!r}, found none; add them around the tables")
    write_text(page, f"{head}{BEGIN}\n\n{block(results)}\n{END}{tail}")


def block(results: dict[str, Any]) -> str:
    """Return the tables and the text between them."""
    judges = results["judges"]
    seeds = sorted({seed for entry in judges.values() for seed in entry["seeds"]})
    head = HEAD.format(**results, seeds=f"seed{'s' if len(seeds) > 1 else ''} {' '.join(seeds)}")
    parts = [
        head, meanings(judges),
        "### Accuracy on held-out pairs\n", table(judges, ACCURACY),
        "### Paraphrases and refusals\n", table(judges, WORDING),
        f"### Calibration and length\n{length_of(judges)}", table(judges, CALIBRATION),
        SAMPLED, table(judges, DRAWN),
        QUESTION, "\n".join(verdicts(judges)),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def meanings(judges: dict[str, Any]) -> str:
    """A table of what each model and mode is."""
    return (
        "\n".join(["| name | what it is |", "|---|---|", *(f"| `{name}` | {JUDGES[name]} |" for name in judges)]) + "\n"
    )


def table(judges: dict[str, Any], figures: Sequence[str]) -> str:
    """One line for each judge that has any of the metrics."""
    lines = [f"| | {' | '.join(LABELS.get(figure, figure) for figure in figures)} |", "|---" * (1 + len(figures)) + "|"]
    for name, entry in judges.items():
        cells = [spread(values(entry, figure)) for figure in figures]
        if set(cells) != {"–"}:
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def length_of(judges: dict[str, Any]) -> str:
    """Say what the length bias of a perfect model would be."""
    found = next(filter(None, (values(entry, LENGTH) for entry in judges.values())), None)
    return f"\nThe `{LENGTH}`, which is the length bias of a perfect model, is {spread(found)}.\n" if found else ""


def verdicts(judges: dict[str, Any]) -> Iterator[str]:
    """Compare each mode with the scalar model: a line per metric, then how often it is ahead and behind."""
    modes = ("overall", "tier", "composed")
    said = {mode: [verdict(judges[mode], judges[RIVAL], figure) for figure in COMPARED] for mode in modes}
    yield f"| compared with `{RIVAL}` | {' | '.join(f'`{mode}`' for mode in modes)} |"
    yield "|---" * (1 + len(modes)) + "|"
    for figure, *cells in zip(COMPARED, *said.values(), strict=True):
        yield f"| {LABELS.get(figure, figure)} | {' | '.join(cells)} |"
    for word, start in (("ahead", "ahead"), ("behind", "**behind")):
        counts = (f"{sum(one.startswith(start) for one in found)} of {len(COMPARED)}" for found in said.values())
        yield f"| {word} on | {' | '.join(counts)} |"
