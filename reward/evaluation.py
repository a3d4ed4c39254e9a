"""How good a reward model is: pair accuracy in every cut, flip pairs, calibration."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from metaalign_rl.errors import UserError
from metaalign_rl.schema import LABELS, Row
from reward.calibration import calibration_error
from reward.data import labelled_answers
from reward.score import Mode, Score, check_mode, log_combine
from reward.scorer import BATCH_TOKENS, Scorer


@dataclass(frozen=True, slots=True)
class _Judged:
    row: Row
    right: bool  # the chosen answer's value is the higher one; a tie is wrong


def evaluate(scorer: Scorer, rows: Iterable[Row], mode: Mode = "tier", *, batch_tokens: int = BATCH_TOKENS) -> dict[str, Any]:
    """Score the rows' pairs and labelled answers.

    Returns: a JSON object with
        mode, pairs, accuracy: over all pairs, answers compared by `log_combine` in `mode`.
        conflict: `{accuracy, pairs}` of the pairs whose relation is a conflict.
        flip, tier_flip: `{accuracy, groups}`: a group is the rows that share `tags["flip"]` (for `tier_flip`, with
            `tags["flip_kind"]` "tier"); it is right when all its pairs are.
        by_relation, by_family, by_kind, by_split: `{name: {accuracy, pairs}}`; kind and split are tags.
        calibration: `{label: {ece, agreement, answers}}` over the answers with absolute labels; agreement is the
            share whose label p ≥ 0.5 predicts.
        A figure over nothing is null.

    Raises:
        UserError: a row with neither a pair nor a labelled answer, no pair at all, or an unknown mode.
    """
    check_mode(mode)
    rows = list(rows)
    for row in rows:
        if row.chosen is None and not row.labels:
            raise UserError(f"row {row.id!r}: nothing to evaluate; expected 'chosen' and 'rejected', or 'labels'")
    pairs = [row for row in rows if row.chosen is not None]
    if not pairs:
        raise UserError("nothing to evaluate: no row has 'chosen' and 'rejected'")
    judged = _judge(scorer, pairs, mode, batch_tokens)
    return {
        "mode": mode,
        "pairs": len(judged),
        "accuracy": _share([j.right for j in judged]),
        "conflict": _accuracy([j for j in judged if j.row.relation == "conflict"]),
        "flip": _flips(judged),
        "tier_flip": _flips([j for j in judged if j.row.tags.get("flip_kind") == "tier"]),
        "by_relation": _by(judged, lambda row: row.relation),
        "by_family": _by(judged, lambda row: row.family),
        "by_kind": _by(judged, lambda row: row.tags.get("kind")),
        "by_split": _by(judged, lambda row: row.tags.get("split")),
        "calibration": _calibration(scorer, rows, batch_tokens),
    }


def _judge(scorer: Scorer, pairs: Sequence[Row], mode: Mode, batch_tokens: int) -> list[_Judged]:
    answers = [replace(row, response=text) for row in pairs for text in (row.chosen, row.rejected)]
    values = [
        log_combine(score, row, mode)
        for score, row in zip(_score(scorer, answers, batch_tokens), answers, strict=True)
    ]
    return [_Judged(row, values[2 * i] > values[2 * i + 1]) for i, row in enumerate(pairs)]


def _score(scorer: Scorer, answers: Sequence[Row], batch_tokens: int) -> list[Score]:
    texts = [scorer.encode(row, f"row {row.id!r}") for row in answers]
    return scorer.score_tokens(texts, batch_tokens=batch_tokens)


def _by(judged: Sequence[_Judged], key: Callable[[Row], str | None]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[_Judged]] = defaultdict(list)
    for item in judged:
        name = key(item.row)
        if name is not None:
            groups[name].append(item)
    return {name: _accuracy(groups[name]) for name in sorted(groups)}


def _flips(judged: Sequence[_Judged]) -> dict[str, Any]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for item in judged:
        if "flip" in item.row.tags:
            groups[item.row.tags["flip"]].append(item.right)
    whole = [all(group) for group in groups.values() if len(group) > 1]
    return {"accuracy": _share(whole), "groups": len(whole)}


def _calibration(scorer: Scorer, rows: Iterable[Row], batch_tokens: int) -> dict[str, dict[str, Any]]:
    answers = [pair for row in rows for pair in labelled_answers(row)]
    scores = _score(scorer, [row for row, _ in answers], batch_tokens)
    table = {}
    for label in LABELS:
        known = [
            (score.probabilities[label], labels[label])
            for score, (_, labels) in zip(scores, answers, strict=True)
            if label in labels
        ]
        if known:
            probabilities, truths = zip(*known, strict=True)
            table[label] = {
                "ece": calibration_error(probabilities, truths),
                "agreement": _share([(p >= 0.5) == truth for p, truth in known]),
                "answers": len(known),
            }
    return table


def _accuracy(judged: Sequence[_Judged]) -> dict[str, Any]:
    return {"accuracy": _share([j.right for j in judged]), "pairs": len(judged)}


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
