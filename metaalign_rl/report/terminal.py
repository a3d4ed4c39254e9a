"""A run's results in the terminal."""

from pathlib import Path
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json
from metaalign_rl.report.results import HEADLINES, POLICIES


def show(root: Path) -> None:
    """Print the results of the run in the folder `root`.

    Raises:
        UserError: the run has no report yet.
    """
    folder = RunFolder(root)
    if not folder.report.is_file():
        raise UserError(f"{root}: expected report.json, found none; run the stages evaluate and report")
    from rich.console import Console

    report, metrics = read_json(folder.report), read_json(folder.evaluation / "figures.json")
    console = Console(width=None if Console().is_terminal else 110)
    console.print(_following_table(metrics))
    if folder.reward_evaluation.is_file():
        console.print(_reward_table(report))
    if report.get("ppo.alarms"):
        console.print(f"alarms in training: {report['ppo.alarms']} (see the page)", style="red")
    if folder.best_checkpoint.is_file():
        best = read_json(folder.best_checkpoint)
        found = f"best checkpoint of PPO: step {best['step']}, {best['result']:.3f} {best['of']}: {best['policy']}"
        console.print(found, markup=False)
    console.print(_showcase_table(metrics["showcase"]))
    total = sum(value for key, value in report.items() if key.startswith("seconds."))
    models = ", ".join(str(path) for path in (folder.policy, folder.reward) if path.is_dir())
    console.print(
        f"total time: {total / 60:.1f} minutes; page: {folder.page}; metrics: {folder.report}; models: {models}",
        markup=False,
    )


def _following_table(metrics: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Preference following: share of held-out rows (gold checks)", title_justify="left")
    columns = {
        "before, sampled": metrics["sft_sampled"],
        "after, sampled": metrics["ppo_sampled"],
        "before, greedy": metrics["sft_greedy"],
        "after, greedy": metrics["ppo_greedy"],
    }
    # The base rate. In the built-in world it is 0, because no check passes on an empty response.
    if metrics["source"] != "world" or metrics["empty"]["following"] > 0:
        columns["empty response"] = metrics["empty"]
    for column in ("", *columns, "rows"):
        table.add_column(column, justify="left" if not column else "right")
    for name in HEADLINES:
        if name in metrics["empty"]:
            table.add_row(Text(name, "bold"), *(f"{column[name]:.2f}" for column in columns.values()), "")
    for key, values in metrics["empty"]["by"].items():
        table.add_section()
        for value, row in values.items():
            cells = [f"{column['by'][key][value]['following']:.2f}" for column in columns.values()]
            table.add_row(Text(f"{key} {value}"), *cells, str(row["rows"]))
    return table


def _reward_table(report: dict[str, float]) -> Any:
    from rich.table import Table

    table = Table(title="Reward model on held-out pairs", title_justify="left", show_header=False)
    meanings = {
        "reward.accuracy": "all pairs",
        "reward.flip": "flips, right on both pairs",
        "reward.conflict": "conflicts",
        "reward.on_policy": "agreement with gold on the policy's own responses",
        "reward.preference_blind": "control without the meta-prompt",
        "reward.tier_blind": "control that cannot tell the tiers apart, on tier flips",
        "reward.scalar": "control with the label overall only, all pairs",
    }
    for key, meaning in meanings.items():
        if key in report:
            table.add_row(meaning, f"{report[key]:.2f}")
    return table


def _showcase_table(records: list[dict[str, str]]) -> Any:
    from rich.table import Table
    from rich.text import Text  # in a plain string, rich would read [brackets] as markup

    question = records[0]["question"]
    records = [record for record in records if record["question"] == question]
    title = Text(f"{question[:80]!r} under {len(records)} meta-prompts (greedy)", "table.title")
    table = Table(title=title, title_justify="left")
    for column in ("System Info", "User Info", *POLICIES.values()):
        table.add_column(column, overflow="fold")
    for record in records:
        cells = (record["system_info"], record["user_info"], *(record[policy] for policy in POLICIES))
        table.add_row(*(Text(cell[:200]) for cell in cells))
    return table
