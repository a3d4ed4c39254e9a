"""Evaluate a reward model on pairs and labelled answers. `reward.evaluation.pair_metrics` computes the metrics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import exp
from typing import Any

from metaalign_rl.core.dataflow import ANSWERS, Row
from metaalign_rl.core.errors import UserError
from reward.answers import labelled_answers
from reward.evaluation import pair_metrics
from reward.evaluation.pair_metrics import JudgedPair
from reward.score import MODES, Mode, Score, check_mode, labels_read, log_combine, require_trained
from reward.scorer import BATCH_TOKENS, Scorer

Scores = Mapping[tuple[str, str], Score]  # by the row's id and the field that holds the answer


def evaluate(
    scorer: Scorer, rows: Iterable[Row], mode: Mode | None = None, *, batch_tokens: int = BATCH_TOKENS
) -> dict[str, Any]:
    """Evaluate a scorer on the rows' pairs and labelled answers.

    Args:
        mode: see `combine`. Default: the first of `MODES` for which the model was trained.

    Returns:
        A JSON object. A metric over no data is null.

        - `mode`, `pairs`, `accuracy`: over all pairs; `log_combine` in `mode` ranks the answers.
        - `conflict`, `distractor`: `{accuracy, pairs}` of the pairs with that relation.
        - `flip`, `tier_flip`: `{accuracy, groups}`. A group is the rows that share `tags["flip"]`; for `tier_flip` they
          also have `tags["flip_kind"]` "tier". A group is correct if all of its pairs are.
        - `flip_matrix`: `{flip kind: {both, one, neither}}`: how many flips of two rows are correct on both rows, on
          one or on neither. A model that does not read the preference is correct on one.
        - `consistency`: `{accuracy, alike, groups}`. A group is the rows that share `tags["paraphrases"]`: one
          preference in several wordings. The shares that are correct in all wordings, and that have the same outcome in
          all.
        - `refusals`: `{wanted, unwanted: {preferred, pairs}}`: how often a refusal is preferred to an answer, where it
          is the better one and where it is not (over-refusal). Rows without checks are left out.
        - `length_bias`: `{model, gold}`: the correlation of preference and length over the pairs, from -1 to 1, for the
          model and for the data. See `pair_metrics.length_bias`.
        - `by_relation`, `by_family`, `by_kind`, `by_split`: `{name: {accuracy, pairs}}`; kind and split are tags.
        - `by_length`: the same, by whether the chosen answer has more or fewer characters than the rejected one. A
          model that prefers length is better where the chosen answer is longer.
        - `calibration`: `{label: {ece, agreement, answers, curve}}` over the answers with absolute labels. `ece` is the
          expected calibration error, `agreement` the share of labels that p ≥ 0.5 predicts, and `curve` the reliability
          curve: one `{p, share, answers}` for each tenth of the probabilities that has answers, with their mean
          probability, the share of true labels, and their number.

    Raises:
        UserError: a row has neither a pair nor a labelled answer, no row has a pair, two rows share an id, the mode is
            unknown, or the mode reads a label that the model was not trained on.
    """
    if mode is not None:
        return evaluate_modes(scorer, rows, (mode,), batch_tokens=batch_tokens)[mode]
    reports = evaluate_modes(scorer, rows, MODES, batch_tokens=batch_tokens, skip_untrained=True)
    return next(iter(reports.values()))


def evaluate_modes(
    scorer: Scorer,
    rows: Iterable[Row],
    modes: Sequence[Mode],
    *,
    batch_tokens: int = BATCH_TOKENS,
    skip_untrained: bool = False,
) -> dict[str, dict[str, Any]]:
    """The result of `evaluate` for each mode. The rows are scored once.

    Args:
        skip_untrained: leave out the modes that read a label that the model was not trained on. If no mode is left,
            this is an error.
    """
    for mode in modes:
        check_mode(mode)
    rows = list(rows)
    for row in rows:
        if row.chosen is None and not row.labels:
            raise UserError(f"row {row.id!r}: expected 'chosen' and 'rejected', or 'labels'; found nothing to evaluate")
    pairs = [row for row in rows if row.chosen is not None]
    if not pairs:
        raise UserError(f"rows: expected some with 'chosen' and 'rejected', found none among {len(rows)}")
    scores = _score(scorer, rows, batch_tokens)
    if skip_untrained:
        modes = _trained_modes(modes, pairs, scores)
    answers = [(scores[row.id, name].probabilities, labels) for row in rows for name, labels in row.labels.items()]
    calibration = pair_metrics.calibration(answers)
    return {mode: {"mode": mode, **_pair_report(pairs, scores, mode), "calibration": calibration} for mode in modes}


def _trained_modes(modes: Sequence[Mode], pairs: Sequence[Row], scores: Scores) -> list[Mode]:
    """The modes that read only labels that the model was trained on.

    Raises:
        UserError: there is none.
    """
    untrained = frozenset().union(*(score.untrained for score in scores.values()))
    read = {mode: {label for row in pairs for label in labels_read(row, mode)} for mode in modes}
    found = [mode for mode in modes if untrained.isdisjoint(read[mode])]
    if not found:
        require_trained(modes[0], read[modes[0]], untrained)
    return found


def _score(scorer: Scorer, rows: Iterable[Row], batch_tokens: int) -> Scores:
    """The scores of all pairs and labelled answers."""
    answers = {}
    for row in rows:
        labelled_answers(row)  # refuses labels of a missing answer
        if any((row.id, name) in answers for name in ANSWERS):
            raise UserError(f"row {row.id!r}: expected unique ids, found this one twice; rename one of the rows")
        for name in {*row.labels, *(("chosen", "rejected") if row.chosen is not None else ())}:
            answers[row.id, name] = scorer.encode(replace(row, response=getattr(row, name)), f"row {row.id!r}")
    return dict(zip(answers, scorer.score_tokens(list(answers.values()), batch_tokens=batch_tokens), strict=True))


def _pair_report(rows: Sequence[Row], scores: Scores, mode: Mode) -> dict[str, Any]:
    pairs = [_judge(row, scores, mode) for row in rows]
    return {
        "pairs": len(pairs),
        "accuracy": pair_metrics.accuracy(pairs)["accuracy"],
        "conflict": pair_metrics.accuracy_on_relation(pairs, "conflict"),
        "distractor": pair_metrics.accuracy_on_relation(pairs, "distractor"),
        "flip": pair_metrics.flip_accuracy(pairs),
        "tier_flip": pair_metrics.flip_accuracy([pair for pair in pairs if pair.row.tags.get("flip_kind") == "tier"]),
        "flip_matrix": pair_metrics.flip_matrix(pairs),
        "consistency": pair_metrics.consistency(pairs),
        "refusals": pair_metrics.refusals(pairs),
        "length_bias": pair_metrics.length_bias(pairs),
        "by_relation": pair_metrics.accuracy_by(pairs, lambda row: row.relation),
        "by_family": pair_metrics.accuracy_by(pairs, lambda row: row.family),
        "by_kind": pair_metrics.accuracy_by(pairs, lambda row: row.tags.get("kind")),
        "by_split": pair_metrics.accuracy_by(pairs, lambda row: row.tags.get("split")),
        "by_length": pair_metrics.accuracy_by(pairs, pair_metrics.length_order),
    }


def _judge(row: Row, scores: Scores, mode: Mode) -> JudgedPair:
    # Logarithms still rank answers whose probabilities both round to 1.
    chosen, rejected = (log_combine(scores[row.id, name], row, mode) for name in ("chosen", "rejected"))
    return JudgedPair(row, correct=chosen > rejected, gap=exp(chosen) - exp(rejected))
