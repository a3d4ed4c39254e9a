"""What a run came to: `report.json`, the page `report.html`, and the tables on the terminal."""

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.report import page, results
from metaalign_rl.report.terminal import show

__all__ = ["build", "show"]


def build(folder: RunFolder, mode: str) -> dict[str, float]:
    """Write `report.json` and `report.html`; the figures.

    Args:
        mode: which of the reward model's scores PPO used.
    """
    report = results.build(folder, mode)
    page.build(folder, mode)
    return report
