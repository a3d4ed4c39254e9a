"""The tables of `docs/reward-model.md` from the results of `benchmarks.reward_models`, between two marks there."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.baselines_page import DOCS, spread, values, verdict
from metaalign_rl.core.files import write_text

PAGE = DOCS / "reward-model.md"
BEGIN, END = "<!-- benchmarks.reward_models writes from here -->", "<!-- to here -->"
ON_PAIRS = (
    "accuracy", "conflict", "distractor", "flips", "tier flips", "paraphrases, right", "paraphrases, alike",
    "over-refusal", "refusals", "ece", "length bias", "length in the data",
)  # fmt: skip
DRAWN = ("pairs drawn", "best of 8, following", "best of 8, conflict", "best of 8, distractor")
COMPARED = ("accuracy", "conflict", "distractor", "flips", "paraphrases, right", *DRAWN)
RIVAL = "scalar"

HEAD = """`{command}` measured these ({machine}; {seeds}). The figures are means
over the seeds, the lowest and highest in brackets. All models of a seed start from one SFT policy, the quickstart's,
and are trained on the same rows in the same order.
"""
PAIRS = "On held-out pairs. The figures are those of `metaalign-rl evaluate`, as explained above.\n"
POLICY = """On eight answers that the SFT policy draws to each held-out prompt, at temperature 1. `pairs drawn`: of a
good and a bad one, the good one has the higher score. `best of 8`: the answer with the highest score, judged by the
rows' checks.
"""
QUESTION = """### Does scoring by tier pay?

Beside `scalar`, which learns the label `overall` alone, `overall` shows what labels by tier are worth in training,
`tier` and `composed` what they are worth when answers are scored. Ahead: its worst seed is above the scalar's best. In
brackets the mean difference over the seeds, and the least and most where that says more.
"""


def write(results: dict[str, Any], page: Path) -> None:
    """Put the tables between the page's marks.

    Raises:
        SystemExit: the page has no marks.
    """
    head, begin, rest = page.read_text("utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page}: expected the lines {BEGIN!r} and {END!r}, between which the tables go")
    write_text(page, f"{head}{BEGIN}\n\n{block(results)}\n{END}{tail}")


def block(results: dict[str, Any]) -> str:
    """The tables, and what they say."""
    judges = results["judges"]
    seeds = sorted({seed for entry in judges.values() for seed in entry["seeds"]})
    named = f"seed{'s' if len(seeds) > 1 else ''} {' '.join(seeds)}"
    head = HEAD.format(**results, seeds=named)
    return "\n".join([head, PAIRS, table(judges, ON_PAIRS), POLICY, table(judges, DRAWN), QUESTION, *verdicts(judges)])


def table(judges: dict[str, Any], figures: Sequence[str]) -> str:
    """One line for each judge that has any of the figures."""
    lines = [f"| | | {' | '.join(figures)} |", "|---" * (2 + len(figures)) + "|"]
    for name, entry in judges.items():
        cells = [spread(values(entry, figure)) for figure in figures]
        if set(cells) != {"–"}:
            lines.append(f"| `{name}` | {entry['meaning']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def verdicts(judges: dict[str, Any]) -> Iterator[str]:
    """Of each mode, how it stands to the scalar model on each figure, and the count of that."""
    for mode in ("overall", "tier", "composed"):
        said = [verdict(judges[mode], judges[RIVAL], figure) for figure in COMPARED]
        ahead, behind = (sum(one.startswith(word) for one in said) for word in ("ahead", "**behind**"))
        yield f"- `{mode}`: ahead on {ahead} of {len(said)} figures, behind on {behind}. {'; '.join(said)}."
    yield ""
