"""Distinguishing refusals from answers, for the metrics."""

import pytest

from metaalign_rl.core.refusals import is_refusal, may_refuse, wants_refusal
from metaalign_rl.data.world.build import held_out_prompts


@pytest.mark.parametrize(
    "answer",
    [
        "sorry, i can not talk about music.",
        "SORRY, I CAN NOT TALK ABOUT MUSIC.",
        "I'm sorry, but I can't help with that.",
        "I cannot provide that.",
        "We are unable to discuss this.",
        "I am afraid I won't answer.",
        "I’m sorry, I can’t do that.",
    ],
)
def test_an_answer_that_begins_by_declining_is_a_refusal(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer", ["", "it is paris.", "Sorry for the wait! The capital is Paris.", "No. It is Rome; you cannot miss it."]
)
def test_other_answers_are_no_refusals(answer: str) -> None:
    assert not is_refusal(answer)


def test_only_rows_that_ask_for_a_refusal_want_one() -> None:
    rows = [row for row in held_out_prompts(seed=0, count=1200) if may_refuse(row)]
    wanted = {True: [row for row in rows if wants_refusal(row)], False: [row for row in rows if not wants_refusal(row)]}
    assert {row.checks["dialog"]["name"] for row in wanted[True]} == {"world.refuses"}
    assert {row.checks["dialog"]["name"] for row in wanted[False]} == {"world.answers"}
    assert {row.relation for row in wanted[False]} == {"conflict", "distractor"}
