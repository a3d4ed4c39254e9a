"""Evaluate a reward model on pairs and labelled responses; `pair_metrics` computes the metrics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import exp
from typing import Any

from metaalign_rl.core.dataflow import ANSWERS, Row
from metaalign_rl.core.errors import UserError
from reward.evaluation import pair_metrics
from reward.evaluation.pair_metrics import JudgedPair
from reward.examples import labelled_answers
from reward.score import Mode, Score, check_mode, log_combine
from reward.scorer import BATCH_TOKENS, Scorer

Scores = Mapping[tuple[str, str], Score]  # by the row's id and the answer's field


def evaluate(
    scorer: Scorer, rows: Iterable[Row], mode: Mode = "tier", *, batch_tokens: int = BATCH_TOKENS
) -> dict[str, Any]:
    """Score the rows' pairs and labelled answers.

    Returns: a JSON object with
        mode, pairs, accuracy: over all pairs, answers compared by `log_combine` in `mode`.
        conflict, distractor: `{accuracy, pairs}` of the pairs of that relation.
        flip, tier_flip: `{accuracy, groups}`: a group is the rows that share `tags["flip"]` (for
            `tier_flip`, with `tags["flip_kind"]` "tier"); it is right when all its pairs are.
        flip_matrix: `{flip kind: {both, one, neither}}`: of the flips of two rows, how many are right both ways, one
            way or neither. A model that does not read the preference is right one way.
        consistency: `{accuracy, alike, groups}`: a group is the rows that share `tags["paraphrases"]`, one preference
            in several wordings; the share that is right in all of them, and the share judged alike in all.
        refusals: `{wanted, unwanted: {preferred, pairs}}`: how often a refusal is preferred to an answer where it is
            the better one, and where it is not (over-refusal); only rows with checks. See `figures.refusals`.
        length_bias: `{model, gold}`: how preference and length go together over the pairs, -1 to 1, by the model and
            by the data. See `figures.length_bias`.
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
    return evaluate_modes(scorer, rows, (mode,), batch_tokens=batch_tokens)[mode]


def evaluate_modes(
    scorer: Scorer, rows: Iterable[Row], modes: Sequence[Mode], *, batch_tokens: int = BATCH_TOKENS
) -> dict[str, dict[str, Any]]:
    """The report of `evaluate` by mode, for one pass over the rows."""
    for mode in modes:
        check_mode(mode)
    rows = list(rows)
    for row in rows:
        if row.chosen is None and not row.labels:
            raise UserError(f"row {row.id!r}: nothing to evaluate; expected 'chosen' and 'rejected', or 'labels'")
    pairs = [row for row in rows if row.chosen is not None]
    if not pairs:
        raise UserError("nothing to evaluate: no row has 'chosen' and 'rejected'")
    scores = _score(scorer, rows, batch_tokens)
    answers = [(scores[row.id, name].probabilities, labels) for row in rows for name, labels in row.labels.items()]
    calibration = pair_metrics.calibration(answers)
    return {mode: {"mode": mode, **_report(pairs, scores, mode), "calibration": calibration} for mode in modes}


def _score(scorer: Scorer, rows: Iterable[Row], batch_tokens: int) -> Scores:
    """The scores of all pairs and labelled answers."""
    answers = {}
    for row in rows:
        labelled_answers(row)  # refuses labels of an answer that is not there
        if any((row.id, name) in answers for name in ANSWERS):
            raise UserError(f"row {row.id!r}: the id stands twice among the rows to evaluate")
        for name in {*row.labels, *(("chosen", "rejected") if row.chosen is not None else ())}:
            answers[row.id, name] = scorer.encode(replace(row, response=getattr(row, name)), f"row {row.id!r}")
    return dict(zip(answers, scorer.score_tokens(list(answers.values()), batch_tokens=batch_tokens), strict=True))


def _report(pairs: Sequence[Row], scores: Scores, mode: Mode) -> dict[str, Any]:
    judged = [_judge(row, scores, mode) for row in pairs]
    return {
        "pairs": len(judged),
        "accuracy": pair_metrics.accuracy(judged)["accuracy"],
        "conflict": pair_metrics.of_relation(judged, "conflict"),
        "distractor": pair_metrics.of_relation(judged, "distractor"),
        "flip": pair_metrics.flips(judged),
        "tier_flip": pair_metrics.flips([item for item in judged if item.row.tags.get("flip_kind") == "tier"]),
        "flip_matrix": pair_metrics.flip_matrix(judged),
        "consistency": pair_metrics.consistency(judged),
        "refusals": pair_metrics.refusals(judged),
        "length_bias": pair_metrics.length_bias(judged),
        "by_relation": pair_metrics.by(judged, lambda row: row.relation),
        "by_family": pair_metrics.by(judged, lambda row: row.family),
        "by_kind": pair_metrics.by(judged, lambda row: row.tags.get("kind")),
        "by_split": pair_metrics.by(judged, lambda row: row.tags.get("split")),
        "by_length": pair_metrics.by(judged, pair_metrics.which_is_longer),
    }


def _judge(row: Row, scores: Scores, mode: Mode) -> JudgedPair:
    # Logarithms still tell answers apart whose probabilities both round to 1.
    chosen, rejected = (log_combine(scores[row.id, name], row, mode) for name in ("chosen", "rejected"))
    return JudgedPair(row, right=chosen > rejected, gap=exp(chosen) - exp(rejected))
