"""Gold: the results of a row's checks for an answer."""

from dataclasses import dataclass

from metaalign_rl.core.dataflow import Row
from metaalign_rl.data.checks import run_check


@dataclass(frozen=True, slots=True)
class Verdict:
    """The results of one row's checks for one answer.

    Attributes:
        passes: whether the check of a tier passes, for the tiers that have one.
        following: the governing tier's check passes, and so does the dialog's if it has one. None if the governing tier
            has no check.
        strict: `following`, and the other tier's check, if it has one, gives what the relation requires: it passes in
            `agree`, and fails in `conflict` and `distractor`. None if `following` is None.
    """

    passes: dict[str, bool]
    following: bool | None
    strict: bool | None


def judge(row: Row, answer: str) -> Verdict:
    """Run every check of `row` on `answer`. An empty answer passes no check.

    Raises:
        UserError: a check is unknown, or does not accept its arguments.
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
    """Absolute labels of an answer for the reward model, by label; no `overall` without a check of the governing tier.

    The tier of a distractor is always satisfied, because it asks for nothing.

    Raises:
        UserError: see `judge`.
    """
    verdict = judge(row, answer)
    found = dict(verdict.passes)
    if row.relation == "distractor":
        found["user" if row.tier == "system" else "system"] = True
    return found if verdict.strict is None else found | {"overall": verdict.strict}
