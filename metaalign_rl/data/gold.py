"""Gold: what the rows' checkers say of an answer."""

from dataclasses import dataclass

from metaalign_rl.core.dataflow import Row
from metaalign_rl.data.checks import run_check


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the checks of one row say of one answer.

    Attributes:
        passes: by tier, whether its check passes; only tiers that have one.
        following: the governing tier's check passes, and the dialog's where there is one; None without a check of
            the governing tier, since nothing then says what the answer did.
        strict: `following`, and the other tier is treated as its relation to the row demands: in a conflict its check
            does not pass, nor does a distractor's; in agreement it does. None where `following` is.
    """

    passes: dict[str, bool]
    following: bool | None
    strict: bool | None


def judge(row: Row, answer: str) -> Verdict:
    """Run every check of `row` on `answer`. An empty answer passes nothing.

    Raises:
        UserError: the row names an unknown check, or arguments that it does not take.
    """
    passes = {
        tier: bool(answer.strip()) and run_check(check, answer, f"row {row.id!r}: checks.{tier}")
        for tier, check in row.checks.items()
    }
    if row.tier not in passes:
        return Verdict(passes, following=None, strict=None)
    following = passes[row.tier] and passes.get("dialog", True)
    other = passes.get("user" if row.tier == "system" else "system")
    wanted = {"agree": True, "conflict": False, "distractor": False}.get(row.relation)
    return Verdict(passes, following, following and (other is None or wanted is None or other == wanted))


def labels(row: Row, answer: str) -> dict[str, bool]:
    """Absolute labels for the reward model; no `overall` without a check of the governing tier.

    A distractor asks nothing of the answer, so its tier is satisfied.
    """
    verdict = judge(row, answer)
    found = dict(verdict.passes)
    if row.relation == "distractor":
        found["user" if row.tier == "system" else "system"] = True
    return found if verdict.strict is None else found | {"overall": verdict.strict}
