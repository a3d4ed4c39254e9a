"""A run's results on the terminal."""

from pathlib import Path
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json
from metaalign_rl.report.results import HEADLINES, POLICIES


def show(root: Path) -> None:
    """Print a run's results from its files.

    Raises:
        UserError: the run has not come to its report.
    """
    folder = RunFolder(root)
    if not folder.report.is_file():
        raise UserError(f"{root}: no report.json there yet; run the stages evaluate and report")
    from rich.console import Console

    report, figures = read_json(folder.report), read_json(folder.evaluation / "figures.json")
    console = Console(width=None if Console().is_terminal else 110)
    console.print(_following_table(figures))
    if folder.reward_evaluation.is_file():
        console.print(_reward_table(report))
    if report.get("ppo.alarms"):
        console.print(f"alarms in training: {report['ppo.alarms']}; see the page", style="red")
    console.print(_showcase_table(figures["showcase"]))
    total = sum(value for key, value in report.items() if key.startswith("seconds."))
    models = ", ".join(str(path) for path in (folder.policy, folder.reward) if path.is_dir())
    console.print(
        f"{total / 60:.1f} minutes in all; page: {folder.page}; figures: {folder.report}; models: {models}",
        markup=False,
    )


def _following_table(figures: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Share of held-out rows that follow what governs (gold checks)", title_justify="left")
    columns = {
        "before, sampled": figures["sft_sampled"],
        "after, sampled": figures["ppo_sampled"],
        "before, greedy": figures["sft_greedy"],
        "after, greedy": figures["ppo_greedy"],
    }
    # The base rate: what no answer at all gets. The world's checks give it nothing.
    if figures["source"] != "world" or figures["empty"]["following"] > 0:
        columns["empty answer"] = figures["empty"]
    for column in ("", *columns, "rows"):
        table.add_column(column, justify="left" if not column else "right")
    for name in HEADLINES:
        if name in figures["empty"]:
            table.add_row(Text(name, "bold"), *(f"{column[name]:.2f}" for column in columns.values()), "")
    for cut, values in figures["empty"]["by"].items():
        table.add_section()
        for value, row in values.items():
            cells = [f"{column['by'][cut][value]['following']:.2f}" for column in columns.values()]
            table.add_row(Text(f"{cut} {value}"), *cells, str(row["rows"]))
    return table


def _reward_table(report: dict[str, float]) -> Any:
    from rich.table import Table

    table = Table(title="Reward model on held-out pairs", title_justify="left", show_header=False)
    meanings = {
        "reward.accuracy": "all pairs",
        "reward.flip": "flips, right both ways",
        "reward.conflict": "conflicts",
        "reward.on_policy": "agreement with gold on the policy's own answers",
        "reward.preference_blind": "control without the meta-prompt",
        "reward.tier_blind": "control that cannot tell the tiers, on tier flips",
        "reward.scalar": "control with the label overall alone, all pairs",
    }
    for key, meaning in meanings.items():
        if key in report:
            table.add_row(meaning, f"{report[key]:.2f}")
    return table


def _showcase_table(records: list[dict[str, str]]) -> Any:
    from rich.table import Table
    from rich.text import Text  # plain: rich would read [brackets] in a row's text as its own markup

    question = records[0]["question"]
    records = [record for record in records if record["question"] == question]
    title = Text(f"{question[:80]!r} under {len(records)} meta-prompts, greedily", "table.title")
    table = Table(title=title, title_justify="left")
    for column in ("System Info", "User Info", *POLICIES.values()):
        table.add_column(column, overflow="fold")
    for record in records:
        cells = (record["system_info"], record["user_info"], *(record[policy] for policy in POLICIES))
        table.add_row(*(Text(cell[:200]) for cell in cells))
    return table
