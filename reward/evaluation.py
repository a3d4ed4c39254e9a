"""How good a reward model is: pair accuracy in every cut, flip pairs, calibration."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from metaalign_rl.errors import UserError
from metaalign_rl.schema import ANSWERS, LABELS, Row
from reward.calibration import calibration_error, reliability
from reward.data import labelled_answers
from reward.score import Mode, Score, check_mode, log_combine
from reward.scorer import BATCH_TOKENS, Scorer


@dataclass(frozen=True, slots=True)
class _Judged:
    row: Row
    right: bool  # the chosen answer's value is the higher one; a tie is wrong


def evaluate(
    scorer: Scorer, rows: Iterable[Row], mode: Mode = "tier", *, batch_tokens: int = BATCH_TOKENS
) -> dict[str, Any]:
    """Score the rows' pairs and labelled answers.

    Returns: a JSON object with
        mode, pairs, accuracy: over all pairs, answers compared by `log_combine` in `mode`.
        conflict: `{accuracy, pairs}` of the pairs whose relation is a conflict.
        flip, tier_flip: `{accuracy, groups}`: a group is the rows that share `tags["flip"]` (for
            `tier_flip`, with `tags["flip_kind"]` "tier"); it is right when all its pairs are.
        flip_matrix: `{flip kind: {both, one, neither}}`: of the flips of two rows, how many are right both ways, one
            way or neither. A model that does not read the preference is right one way.
        by_relation, by_family, by_kind, by_split: `{name: {accuracy, pairs}}`; kind and split are tags.
        by_length: the same by whether the chosen answer has more or fewer characters than the rejected one. A model
            that likes length is better at the former.
        calibration: `{label: {ece, agreement, answers, curve}}` over the answers with absolute labels; agreement is
            the share whose label p ≥ 0.5 predicts, and the curve one `{p, share, answers}` for each tenth of the
            probabilities that has answers: their mean, and the share of true labels.
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
    scores = _score(scorer, rows, batch_tokens)
    judged = [_judge(row, scores, mode) for row in pairs]
    return {
        "mode": mode,
        "pairs": len(judged),
        "accuracy": _share([j.right for j in judged]),
        "conflict": _accuracy([j for j in judged if j.row.relation == "conflict"]),
        "flip": _flips(judged),
        "tier_flip": _flips([j for j in judged if j.row.tags.get("flip_kind") == "tier"]),
        "flip_matrix": _flip_matrix(judged),
        "by_relation": _by(judged, lambda row: row.relation),
        "by_family": _by(judged, lambda row: row.family),
        "by_kind": _by(judged, lambda row: row.tags.get("kind")),
        "by_split": _by(judged, lambda row: row.tags.get("split")),
        "by_length": _by(judged, _longer),
        "calibration": _calibration(rows, scores),
    }


def _score(scorer: Scorer, rows: Iterable[Row], batch_tokens: int) -> dict[tuple[str, str], Score]:
    """The scores of all pairs and labelled answers, by the row's id and the answer's field."""
    answers = {}
    for row in rows:
        labelled_answers(row)  # refuses labels of an answer that is not there
        if any((row.id, name) in answers for name in ANSWERS):
            raise UserError(f"row {row.id!r}: the id stands twice among the rows to evaluate")
        for name in {*row.labels, *(("chosen", "rejected") if row.chosen is not None else ())}:
            answers[row.id, name] = scorer.encode(replace(row, response=getattr(row, name)), f"row {row.id!r}")
    return dict(zip(answers, scorer.score_tokens(list(answers.values()), batch_tokens=batch_tokens), strict=True))


def _judge(row: Row, scores: Mapping[tuple[str, str], Score], mode: Mode) -> _Judged:
    chosen, rejected = (log_combine(scores[row.id, name], row, mode) for name in ("chosen", "rejected"))
    return _Judged(row, chosen > rejected)


def _by(judged: Sequence[_Judged], key: Callable[[Row], str | None]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[_Judged]] = defaultdict(list)
    for item in judged:
        name = key(item.row)
        if name is not None:
            groups[name].append(item)
    return {name: _accuracy(groups[name]) for name in sorted(groups)}


def _longer(row: Row) -> str:
    assert row.chosen is not None and row.rejected is not None
    more = len(row.chosen) - len(row.rejected)
    return "chosen is longer" if more > 0 else "chosen is shorter" if more < 0 else "as long"


def _flips(judged: Sequence[_Judged]) -> dict[str, Any]:
    whole = [all(item.right for item in group) for group in _flip_groups(judged)]
    return {"accuracy": _share(whole), "groups": len(whole)}


def _flip_matrix(judged: Sequence[_Judged]) -> dict[str, dict[str, int]]:
    matrix: dict[str, dict[str, int]] = {}
    for group in _flip_groups(judged):
        if len(group) == 2:
            kind = group[0].row.tags.get("flip_kind", "value")
            outcome = ("neither", "one", "both")[sum(item.right for item in group)]
            matrix.setdefault(kind, {"both": 0, "one": 0, "neither": 0})[outcome] += 1
    return matrix


def _flip_groups(judged: Sequence[_Judged]) -> list[list[_Judged]]:
    groups: dict[str, list[_Judged]] = defaultdict(list)
    for item in judged:
        if "flip" in item.row.tags:
            groups[item.row.tags["flip"]].append(item)
    return [group for group in groups.values() if len(group) > 1]


def _calibration(rows: Iterable[Row], scores: Mapping[tuple[str, str], Score]) -> dict[str, dict[str, Any]]:
    answers = [(scores[row.id, name].probabilities, labels) for row in rows for name, labels in row.labels.items()]
    table = {}
    for label in LABELS:
        known = [(probabilities[label], labels[label]) for probabilities, labels in answers if label in labels]
        if known:
            probabilities, truths = zip(*known, strict=True)
            table[label] = {
                "ece": calibration_error(probabilities, truths),
                "agreement": _share([(p >= 0.5) == truth for p, truth in known]),
                "answers": len(known),
                "curve": reliability(probabilities, truths),
            }
    return table


def _accuracy(judged: Sequence[_Judged]) -> dict[str, Any]:
    return {"accuracy": _share([j.right for j in judged]), "pairs": len(judged)}


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
