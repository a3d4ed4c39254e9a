"""The metrics of a reward model's evaluation, from pairs that it has ranked and answers that it has scored."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.refusals import is_refusal
from reward.evaluation.calibration import calibration_error, reliability

LabelledAnswer = tuple[dict[str, float], dict[str, bool]]  # probabilities by label, and the labels that are known


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A pair as a reward model ranks it.

    Attributes:
        correct: the chosen answer's value is higher; a tie is wrong.
        gap: probability that the chosen answer is good, minus that of the rejected answer; from -1 to 1.
    """

    row: Row
    correct: bool
    gap: float


def accuracy(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """`{accuracy, pairs}`: the share of correct pairs, and the number of pairs."""
    return {"accuracy": _share([pair.correct for pair in pairs]), "pairs": len(pairs)}


def accuracy_on_relation(pairs: Sequence[JudgedPair], relation: str) -> dict[str, Any]:
    """`accuracy` of the pairs with one relation."""
    return accuracy([pair for pair in pairs if pair.row.relation == relation])


def accuracy_by(pairs: Sequence[JudgedPair], key: Callable[[Row], str | None]) -> dict[str, dict[str, Any]]:
    """`accuracy` by the key of the row. Pairs with the key None are left out."""
    groups: dict[str, list[JudgedPair]] = defaultdict(list)
    for pair in pairs:
        name = key(pair.row)
        if name is not None:
            groups[name].append(pair)
    return {name: accuracy(groups[name]) for name in sorted(groups)}


def length_order(row: Row) -> str:
    """Which answer has more characters: `chosen is longer`, `chosen is shorter` or `as long`."""
    extra = _extra_length(row)
    return "chosen is longer" if extra > 0 else "chosen is shorter" if extra < 0 else "as long"


def flip_accuracy(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """`{accuracy, groups}` over the flips. A flip is correct if all of its pairs are."""
    correct = [all(pair.correct for pair in flip) for flip in _groups(pairs, "flip")]
    return {"accuracy": _share(correct), "groups": len(correct)}


def flip_matrix(pairs: Sequence[JudgedPair]) -> dict[str, dict[str, int]]:
    """By kind of flip, how many flips of two rows are correct on `both` rows, on `one` or on `neither`."""
    matrix: dict[str, dict[str, int]] = {}
    for flip in _groups(pairs, "flip"):
        if len(flip) == 2:
            kind = flip[0].row.tags.get("flip_kind", "value")
            outcome = ("neither", "one", "both")[sum(pair.correct for pair in flip)]
            matrix.setdefault(kind, {"both": 0, "one": 0, "neither": 0})[outcome] += 1
    return matrix


def consistency(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """`{accuracy, alike, groups}` over groups of paraphrases: one preference in several wordings.

    `accuracy` is the share of groups that are correct in every wording. `alike` is the share with the same outcome in
    every wording, correct or not.
    """
    groups = [[pair.correct for pair in group] for group in _groups(pairs, "paraphrases")]
    return {
        "accuracy": _share([all(group) for group in groups]),
        "alike": _share([len(set(group)) == 1 for group in groups]),
        "groups": len(groups),
    }


def refusals(pairs: Sequence[JudgedPair]) -> dict[str, dict[str, Any]]:
    """`{wanted, unwanted: {preferred, pairs}}` over pairs in which exactly one answer is a refusal.

    `preferred` is how often the model prefers the refusal. In `wanted` the refusal is the better answer; in `unwanted`
    it is the worse one (over-refusal). In both, a tie counts as wrong. Only a check can decide whether a refusal is
    asked for, so pairs without checks are left out.
    """
    checked = [pair for pair in pairs if pair.row.checks]
    wanted = [pair.correct for pair in checked if _refuses(pair.row.chosen) and not _refuses(pair.row.rejected)]
    unwanted = [not pair.correct for pair in checked if _refuses(pair.row.rejected) and not _refuses(pair.row.chosen)]
    return {
        name: {"preferred": _share(preferred), "pairs": len(preferred)}
        for name, preferred in (("wanted", wanted), ("unwanted", unwanted))
    }


def length_bias(pairs: Sequence[JudgedPair]) -> dict[str, float | None]:
    """`{model, gold}`: the correlation, from -1 to 1, of how much better and how much longer one answer is.

    `model` uses the gaps of the model, `gold` a gap of 1 for every pair. Lengths are in characters. Each pair counts in
    both orders, so the means are 0. A model that is always correct and fully confident has the same value as `gold`; a
    higher value is a preference for length.
    """
    extra = [_extra_length(pair.row) for pair in pairs]
    return {
        "model": _cosine([pair.gap for pair in pairs], extra),
        "gold": _cosine([1.0] * len(pairs), extra),
    }


def calibration(answers: Sequence[LabelledAnswer]) -> dict[str, dict[str, Any]]:
    """`{ece, agreement, answers, curve}` of each label that some answer has; see `reward.evaluate`."""
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


def _groups(pairs: Iterable[JudgedPair], tag: str) -> list[list[JudgedPair]]:
    """The pairs that share a tag's value, in groups of two or more."""
    groups: dict[str, list[JudgedPair]] = defaultdict(list)
    for pair in pairs:
        if tag in pair.row.tags:
            groups[pair.row.tags[tag]].append(pair)
    return [group for group in groups.values() if len(group) > 1]


def _extra_length(row: Row) -> int:
    """Characters that the chosen answer has more than the rejected one."""
    assert row.chosen is not None and row.rejected is not None
    return len(row.chosen) - len(row.rejected)


def _refuses(answer: str | None) -> bool:
    assert answer is not None
    return is_refusal(answer)


def _cosine(one: Sequence[float], other: Sequence[float]) -> float | None:
    """The correlation of two lists whose means are 0 by symmetry; None if a list is all zeros."""
    norm = sqrt(sum(a * a for a in one) * sum(b * b for b in other))
    return sum(a * b for a, b in zip(one, other, strict=True)) / norm if norm else None


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
