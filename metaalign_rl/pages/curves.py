"""Data for the pages' charts."""

from typing import Any

MIN_RESPONSES = 10  # per bin; the share of a smaller bin is too uncertain


def reliability(evaluation: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """The reliability curve of each label, without bins of fewer than `MIN_RESPONSES` responses.

    Args:
        evaluation: the result of `reward.evaluate` in one mode.
    """
    curves = {label: found.get("curve", []) for label, found in evaluation.get("calibration", {}).items()}
    return {label: [bin for bin in curve if bin["answers"] >= MIN_RESPONSES] for label, curve in curves.items()}
