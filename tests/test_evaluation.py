"""The figures of a policy from its rows' verdicts."""

from typing import Any

import pytest

from metaalign_rl.data.gold import Verdict
from metaalign_rl.evaluation import Judged, breakdown, headline, judge_all
from metaalign_rl.schema import Row


def judged(relation: str, following: bool, strict: bool | None = None, **fields: Any) -> Judged:
    row = Row(
        id="a",
        family="priority",
        relation=relation,
        tier="system",
        system_info="be brief",
        user_info="",
        messages=[{"role": "user", "content": "who?"}],
        **fields,
    )
    return row, Verdict({}, following, following if strict is None else strict)


def test_following_is_the_mean_over_relations_whatever_their_numbers_of_rows() -> None:
    rows = [judged("agree", True)] * 3 + [judged("neutral", False)]
    assert headline(rows) == {"following": 0.5}


def test_conflict_and_distractor_also_ask_that_the_other_tier_lost() -> None:
    rows = [judged("conflict", True, strict=False), judged("conflict", True), judged("distractor", True, strict=False)]
    assert headline(rows) == {"following": 1.0, "conflict": 0.5, "distractor": 0.0}


def test_the_breakdown_counts_rows_by_every_cut() -> None:
    rows = [judged("agree", True, tags={"kind": "case"}), judged("agree", False, tags={"kind": "case"})]
    rows.append(judged("conflict", True, tags={"split": "topic"}))
    cuts = breakdown(rows)
    assert cuts["relation"] == {"agree": {"following": 0.5, "rows": 2}, "conflict": {"following": 1.0, "rows": 1}}
    assert cuts["kind"] == {"case": {"following": 0.5, "rows": 2}, "none": {"following": 1.0, "rows": 1}}
    assert set(cuts) == {"tier", "relation", "family", "kind", "split"}


def test_a_row_without_a_check_of_its_governing_tier_is_never_counted_as_followed() -> None:
    row, _ = judged("system_only", True)
    with pytest.raises(AssertionError, match="governing tier"):
        headline(judge_all([row], ["anything"]))
