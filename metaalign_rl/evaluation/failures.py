"""The kinds that a policy follows least, with some of its wrong answers."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from metaalign_rl.evaluation.gold_metrics import JudgedResponse, group

FAILING = 0.9  # kinds that are followed less often than this are listed
SAMPLES = 3


def failing_kinds(judged: Sequence[JudgedResponse], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Worst first: the kind, its share `following`, its number of `rows`, and `samples` of what does not follow."""
    kinds = group(judged, lambda row: row.tags.get("kind", "none"))
    wrong = {kind: [found for found in part if not found.verdict.following] for kind, part in kinds.items()}
    following = {kind: 1 - len(wrong[kind]) / len(part) for kind, part in kinds.items()}
    for kind in sorted(kinds, key=lambda kind: (following[kind], kind)):
        if following[kind] < FAILING:
            samples = random.Random(seed).sample(wrong[kind], min(SAMPLES, len(wrong[kind])))
            yield {"kind": kind, "following": following[kind], "rows": len(kinds[kind]), "samples": samples}
