"""A run's report: `report.json`, the page `report.html`, and the tables in the terminal."""

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.report import page, results
from metaalign_rl.report.terminal import show

__all__ = ["build", "show"]


def build(folder: RunFolder, mode: str) -> dict[str, float]:
    """Write `report.json` and `report.html`.

    Args:
        mode: the reward model's mode that PPO used (`reward.mode`).

    Returns: the content of `report.json`.

    Raises:
        UserError: the stage `evaluate` has not run.
    """
    report = results.write(folder, mode)
    page.write(folder, mode)
    return report
