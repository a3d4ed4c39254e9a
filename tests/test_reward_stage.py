"""The reward stage: what it makes of the SFT policy's own answers."""

import threading

from metaalign_rl.progress import in_thread
from metaalign_rl.schema import Row
from metaalign_rl.stages.reward import label_answers

ROW = Row(
    id="row",
    family="helpful",
    relation="system_only",
    tier="system",
    system_info="always write in capitals.",
    user_info="",
    messages=[{"role": "user", "content": "what is the capital of france?"}],
    checks={
        "system": {"name": "world.case", "value": "upper"},
        "dialog": {"name": "world.answers", "value": "paris"},
    },
)


def test_each_bad_answer_makes_a_pair_with_a_good_one() -> None:
    rows = list(label_answers(ROW, ["IT IS PARIS.", "it is paris.", "PARIS.", "IT IS ROME.", "it is rome."]))
    assert [(row.chosen, row.rejected) for row in rows] == [
        ("IT IS PARIS.", "it is paris."),
        ("PARIS.", "IT IS ROME."),
        ("IT IS PARIS.", "it is rome."),
    ]
    assert len({row.id for row in rows}) == 3
    assert rows[1].labels["rejected"] == {"system": True, "dialog": False, "overall": False}


def test_answers_that_are_all_good_or_all_bad_are_labelled_one_by_one() -> None:
    rows = list(label_answers(ROW, ["IT IS PARIS.", "PARIS."]))
    assert [(row.response, row.labels["response"]["overall"]) for row in rows] == [
        ("IT IS PARIS.", True),
        ("PARIS.", True),
    ]
    assert not any(row.chosen for row in rows)


def test_answers_that_differ_in_outer_white_space_are_one() -> None:
    """The template strips them, so the reward model could not tell them apart."""
    assert [row.response for row in label_answers(ROW, ["it is rome.", "\x1f it is rome."])] == ["it is rome."]


def test_work_in_a_thread_of_its_own_returns_its_result_and_leaves_no_thread() -> None:
    before = threading.active_count()
    assert in_thread(lambda: threading.current_thread() is not threading.main_thread())
    assert threading.active_count() == before
