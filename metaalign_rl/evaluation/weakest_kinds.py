"""The preference kinds that a policy follows least, with samples of its wrong responses."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from metaalign_rl.evaluation.gold_metrics import JudgedResponse, group

WEAK_BELOW = 0.9  # a kind is weak if the share of its rows that are followed is below this
SAMPLES = 3  # wrong responses per kind


def weakest_kinds(judged: Sequence[JudgedResponse], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the weak kinds, weakest first.

    Each has its name `kind`, the share `following`, the number of `rows`, and `samples`: some `JudgedResponse`s that
    do not follow. `seed` chooses the samples.
    """
    kinds = group(judged, lambda row: row.tags.get("kind", "none"))
    wrong = {kind: [item for item in part if not item.verdict.following] for kind, part in kinds.items()}
    following = {kind: 1 - len(wrong[kind]) / len(part) for kind, part in kinds.items()}
    for kind in sorted(kinds, key=lambda kind: (following[kind], kind)):
        if following[kind] < WEAK_BELOW:
            samples = random.Random(seed).sample(wrong[kind], min(SAMPLES, len(wrong[kind])))
            yield {"kind": kind, "following": following[kind], "rows": len(kinds[kind]), "samples": samples}
