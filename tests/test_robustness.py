"""Held-out rows whose meta-prompt is removed, swapped between the tiers, or written in invented words."""

from dataclasses import replace

import pytest

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.rows import parse_row
from metaalign_rl.data.flips import can_flip, swap
from metaalign_rl.data.gold import judge
from metaalign_rl.data.world.build import held_out_prompts
from metaalign_rl.data.world.preferences import WORDINGS
from metaalign_rl.evaluation.robustness import changeable, changes, remove


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return held_out_prompts(seed=0, count=120)


def test_every_change_makes_a_valid_row(rows: list[Row]) -> None:
    for change in changes("world").values():
        for row in rows:
            for changed in (change.shown(row), change.judged(row)):
                assert parse_row(changed.to_json(), row.id) == changed
                assert changed.messages == row.messages


def test_removing_the_meta_prompt_keeps_the_question_and_the_checks(rows: list[Row]) -> None:
    for row in rows:
        removed = remove(row)
        assert (removed.system_info, removed.user_info) == ("", "")
        assert removed.checks == row.checks


def test_swapping_twice_changes_nothing(rows: list[Row]) -> None:
    assert [swap(swap(row)) for row in rows] == rows


def test_in_a_swapped_conflict_the_other_preference_governs(rows: list[Row]) -> None:
    row = next(row for row in rows if can_flip(row))
    swapped = swap(row)
    assert swapped.tier == row.tier == "system"
    assert swapped.system_info == row.user_info
    assert swapped.checks["system"] == row.checks["user"]


def test_a_single_preference_still_governs_from_the_other_tier(rows: list[Row]) -> None:
    row = next(row for row in rows if row.relation == "user_only" and row.tags["kind"] == "tone")
    answer = {"formal": "indeed, ", "casual": "hey, "}[row.checks["user"]["value"]]
    assert swap(row).relation == "system_only"
    assert judge(swap(row), answer).passes["system"] == judge(row, answer).passes["user"] is True


def test_renamed_preferences_keep_no_word_that_names_the_preference(rows: list[Row]) -> None:
    renamed = changes("world")["renamed"].shown
    telling = {"capitals", "brief", "formal", "casual", "bullets", "french", "spanish", "doubt", "courage", "silent"}
    said = {word for wording in WORDINGS.values() for phrase in wording.actions for word in phrase.split()}
    assert telling <= said
    for row in rows:
        words = set(f"{renamed(row).system_info} {renamed(row).user_info}".replace(".", "").split())
        assert not words & telling
        assert renamed(row).checks == row.checks


def test_only_the_built_in_world_can_be_renamed() -> None:
    assert "renamed" not in changes("jsonl")


def test_the_rows_to_change_are_sampled_from_all_relations_and_keep_their_order(rows: list[Row]) -> None:
    found = changeable(rows, 60)
    places = [rows.index(row) for row in found]
    assert len(found) == 60
    assert places == sorted(set(places))
    assert {row.relation for row in found} == {row.relation for row in rows}
    assert places[0] < 20 and places[-1] > 100
    assert len(changeable(rows, 10_000)) < len(rows)  # some conflicts cannot be swapped


def test_a_conflict_about_refusing_is_left_out_because_its_dialog_check_depends_on_the_winner(rows: list[Row]) -> None:
    conflicts = [row for row in changeable(rows, len(rows)) if row.relation == "conflict"]
    assert conflicts
    assert all(row.tags["kind"] != "refusal" for row in conflicts)


def test_a_conflict_whose_losing_tier_has_no_check_cannot_be_swapped(rows: list[Row]) -> None:
    row = next(row for row in rows if can_flip(row))
    one_sided = replace(row, checks={tier: row.checks[tier] for tier in ("system", "dialog")})
    assert not can_flip(one_sided)
    assert changeable([one_sided], 1) == []
