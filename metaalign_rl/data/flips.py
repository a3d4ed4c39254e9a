"""Flips: the same dialog with the two tiers' texts swapped."""

from dataclasses import replace

from metaalign_rl.core.dataflow import Row, Tier
from metaalign_rl.core.refusals import may_refuse

SWAPPED: dict[Tier, Tier] = {"system": "user", "user": "system", "dialog": "dialog"}
SWAPPED_RELATION = {"system_only": "user_only", "user_only": "system_only"}
MARK = "-flip"  # ends the id of a swapped row


def can_flip(row: Row) -> bool:
    """Whether the row is a conflict whose checks also fit the swapped row.

    This excludes conflicts about refusing: their dialog's check depends on which tier wins.
    """
    return row.relation == "conflict" and {"system", "user"} <= row.checks.keys() and not may_refuse(row)


def swap(row: Row) -> Row:
    """The row with the texts and the checks of its two tiers swapped. In a conflict the system tier still governs."""
    checks = {str(SWAPPED[tier]): check for tier, check in row.checks.items()}  # type: ignore[index]
    tier = "system" if row.relation == "conflict" else SWAPPED[row.tier]
    return replace(
        row,
        id=_other_id(row.id),
        tier=tier,
        relation=SWAPPED_RELATION.get(row.relation, row.relation),
        system_info=row.user_info,
        user_info=row.system_info,
        checks=checks,
    )


def _other_id(identity: str) -> str:
    return identity.removesuffix(MARK) if identity.endswith(MARK) else identity + MARK
