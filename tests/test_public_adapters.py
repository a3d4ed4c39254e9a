"""Public preference data: the rows that each data set's adapter makes of the published ones."""

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from public_data_toys import (
    answers,
    helpsteer2,
    helpsteer2_pair,
    hh_rlhf,
    multifaceted,
    private_cache,  # noqa: F401  (a fixture)
    read,
    rpr,
    safe_rlhf,
    tiers,
    write,
)

from metaalign_rl.core.errors import UserError
from metaalign_rl.data.public import read_public
from metaalign_rl.data.public.hh_rlhf import parse
from metaalign_rl.data.public.rows import HARMLESS, HELPFUL

# RPR: the better answer depends on the criterion, and on its tier.


def test_an_rpr_row_becomes_six_pairs_whose_labels_depend_on_text_and_tier(tmp_path: Path) -> None:
    rows = read(tmp_path, "rpr", rpr()).train
    x, y = "Gives a short answer.", "Uses vivid images."
    a, b = rpr()["response_a"], rpr()["response_b"]
    assert {tiers(row): answers(row) for row in rows} == {
        (x, ""): (a, b),
        (y, ""): (b, a),
        ("", x): (a, b),
        ("", y): (b, a),
        (x, y): (a, b),
        (y, x): (b, a),
    }
    assert [row.relation for row in rows] == ["system_only"] * 2 + ["user_only"] * 2 + ["conflict"] * 2
    assert [row.tier for row in rows] == ["system"] * 2 + ["user"] * 2 + ["system"] * 2
    assert {row.messages[0]["content"] for row in rows} == {"How do tides work?"}


def test_the_six_pairs_are_three_flip_pairs(tmp_path: Path) -> None:
    rows = read(tmp_path, "rpr", rpr()).train
    assert list(Counter(row.tags["flip"] for row in rows).values()) == [2, 2, 2]
    assert {row.relation: row.tags["flip_kind"] for row in rows} == {
        "system_only": "value",
        "user_only": "value",
        "conflict": "tier",
    }
    assert [row.tags["kind"] for row in rows] == ["Conciseness", "Creativity"] * 3
    assert [row.family for row in rows] == ["helpful"] * 4 + ["priority"] * 2


# Multifaceted Collection: a system message and an instruction in one text.


def test_a_multifaceted_row_is_split_at_its_first_line_break(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "multifaceted", multifaceted("Explain:\n\ntides")).train
    assert (row.relation, row.tier, row.family) == ("system_only", "system", "diverse_opinion")
    assert tiers(row) == ("You are a sailor who talks of storms.", "")
    assert row.messages == [{"role": "user", "content": "Explain:\n\ntides"}]
    assert answers(row) == ("Aye, the sea heaves.", "A periodic change of level.")


def test_a_multifaceted_row_of_one_line_is_counted(tmp_path: Path) -> None:
    found = read(tmp_path, "multifaceted", multifaceted(), multifaceted(input="You are a sailor."))
    assert len(found.train) == 1
    assert found.left_out == {"rows whose input is one line": 1}


# PKU-SafeRLHF: one pair, ranked by two objectives.


def test_when_the_objectives_disagree_the_tier_decides(tmp_path: Path) -> None:
    rows = read(tmp_path, "safe_rlhf", safe_rlhf()).train
    found = {tiers(row): row.chosen for row in rows}
    assert found[HELPFUL, HARMLESS] == "Push the pins up."
    assert found[HARMLESS, HELPFUL] == "Ask a locksmith."
    assert found["", HELPFUL] == found[HELPFUL, ""] == "Push the pins up."
    assert found["", HARMLESS] == found[HARMLESS, ""] == "Ask a locksmith."
    assert {row.family for row in rows} == {"priority"}
    assert {row.tags["kind"] for row in rows} == {"helpful", "harmless"}


def test_when_the_objectives_agree_there_are_two_agree_rows_with_either_order(tmp_path: Path) -> None:
    rows = read(tmp_path, "safe_rlhf", safe_rlhf(better_response_id=1)).train
    assert {tiers(row): answers(row) for row in rows} == {
        (HELPFUL, HARMLESS): ("Ask a locksmith.", "Push the pins up."),
        (HARMLESS, HELPFUL): ("Ask a locksmith.", "Push the pins up."),
    }
    assert {(row.relation, row.tier) for row in rows} == {("agree", "system")}


# HH-RLHF: transcripts, one folder per objective.


CARD = """---
configs:
- config_name: all
  data_files:
  - split: train
    path: ["harmless-base/train*", "helpful-*/train*"]
---
"""


@pytest.mark.parametrize("card", ["", CARD])
def test_a_transcript_becomes_a_dialog_with_its_folders_objective_in_each_tier(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    write(tmp_path / "helpful-base" / "train.jsonl", hh_rlhf("First"))
    write(tmp_path / "harmless-base" / "train.jsonl", hh_rlhf("Second"))
    write(tmp_path / "harmless-base" / "test.jsonl", hh_rlhf("Third"))
    found = read_public("hh_rlhf", str(tmp_path))
    rows = {row.id: row for row in (*found.train, *found.held_out)}
    assert {name: tiers(row) for name, row in rows.items()} == {
        "hh-helpful-base-train-1-system": (HELPFUL, ""),
        "hh-helpful-base-train-1-user": ("", HELPFUL),
        "hh-harmless-base-train-1-system": (HARMLESS, ""),
        "hh-harmless-base-train-1-user": ("", HARMLESS),
        "hh-harmless-base-test-1-system": (HARMLESS, ""),
        "hh-harmless-base-test-1-user": ("", HARMLESS),
    }
    row = rows["hh-helpful-base-train-1-user"]
    assert [(message["role"], message["content"]) for message in row.messages] == [
        ("user", "First"),
        ("assistant", "Hi!"),
        ("user", "A joke?"),
    ]
    assert answers(row) == ("A knock.", "No.")
    assert {row.family for row in found.held_out} == {"priority"}


@pytest.mark.parametrize("path", ["harmless-base/train.jsonl", "harmless-base", "harmless-base-some.jsonl"])
def test_the_path_of_a_file_names_its_objective(path: str, tmp_path: Path) -> None:
    file = Path(path) if path.endswith(".jsonl") else Path(path) / "train.jsonl"
    write(tmp_path / file, *(hh_rlhf(f"Question {number}") for number in range(9)))
    assert {row.tags["kind"] for row in read_public("hh_rlhf", str(tmp_path / path)).train} == {"harmless"}


def test_a_file_whose_path_names_no_objective_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", hh_rlhf())
    with pytest.raises(UserError, match="expected a folder that holds helpful-base or harmless-base"):
        read_public("hh_rlhf", path)


def test_transcripts_that_make_no_pair_are_counted(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "hh_rlhf",
        hh_rlhf(),
        hh_rlhf(chosen="\n\nHuman: Bye\n\nAssistant: Bye."),
        hh_rlhf(rejected=hh_rlhf()["rejected"] + "\n\nHuman: Why?"),
        hh_rlhf(rejected=hh_rlhf()["chosen"]),
        hh_rlhf(rejected=hh_rlhf()["chosen"].removesuffix(" A knock.")),
        dict.fromkeys(("chosen", "rejected"), "\n\nHuman: A\n\nHuman: B\n\nAssistant: C"),
    )
    assert len(found.train) == 2
    assert found.left_out == {
        "rows whose transcripts differ before the last answer": 1,
        "rows with a transcript that does not end with the assistant": 1,
        "rows whose two answers are equal": 1,
        "rows with an empty answer": 1,
        "rows whose dialog does not alternate user and assistant": 1,
    }


SPEAKERS = {"user": "Human", "assistant": "Assistant"}
TEXTS = st.text().map(str.strip).filter(lambda text: not re.search(r"\n\n(Human|Assistant):", text))


@given(st.lists(st.tuples(st.sampled_from(list(SPEAKERS)), TEXTS), min_size=1))
def test_parsing_undoes_rendering(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    assert parse("".join(f"\n\n{SPEAKERS[role]}: {content}" for role, content in turns)) == messages


@pytest.mark.parametrize("text", ["I wrote Human: hello", "one\nHuman: two", "Assistant: a script", "a\n\nHumans: b"])
def test_a_speakers_name_inside_a_message_does_not_split_it(text: str) -> None:
    assert parse(f"\n\nHuman: {text}\n\nAssistant: {text}") == [
        {"role": "user", "content": text},
        {"role": "assistant", "content": text},
    ]


# HelpSteer2: ratings of two answers.


def test_an_attribute_that_differs_gives_rows_that_ask_for_more_of_it_in_each_tier(tmp_path: Path) -> None:
    rows = read(tmp_path, "helpsteer2", helpsteer2(), helpsteer2(response="A tongue.", correctness=2)).train
    assert [(row.relation, row.tags["kind"]) for row in rows] == [
        ("system_only", "correctness"),
        ("user_only", "correctness"),
    ]
    assert rows[0].system_info == rows[1].user_info == "Get every fact right and leave no important one out."
    assert {answers(row) for row in rows} == {("A language.", "A tongue.")}
    assert {row.strength for row in rows} == {0.5}  # rated 4 and 2, of 0 to 4


def test_length_and_depth_also_give_rows_that_ask_for_less_with_the_opposite_label(tmp_path: Path) -> None:
    rows = read(tmp_path, "helpsteer2", *helpsteer2_pair()).train
    more, less = "Answer at length and in detail.", "Answer briefly."
    short, long = "A language.", "A language by Microsoft."
    assert {tiers(row): row.chosen for row in rows} == {
        (more, ""): long,
        (less, ""): short,
        ("", more): long,
        ("", less): short,
        (more, less): long,
        (less, more): short,
    }


def test_a_prompt_with_turn_marks_becomes_a_dialog(tmp_path: Path) -> None:
    prompt = "Who wrote it?\n\n<extra_id_1>Assistant\nMary did.\n\n<extra_id_1>User\nWhen?"
    (row, *_) = read(tmp_path, "helpsteer2", *helpsteer2_pair(prompt)).train
    assert row.messages == [
        {"role": "user", "content": "Who wrote it?"},
        {"role": "assistant", "content": "Mary did."},
        {"role": "user", "content": "When?"},
    ]


def test_answers_without_a_second_answer_or_a_difference_are_counted(tmp_path: Path) -> None:
    alike = [helpsteer2("alike"), helpsteer2("alike", response="A tongue.")]
    found = read(tmp_path, "helpsteer2", helpsteer2("single"), *alike, *helpsteer2_pair())
    assert len(found.train) == 6
    assert found.left_out == {
        "rows without a second answer to their prompt": 1,
        "rows whose two answers have equal ratings": 2,
    }
