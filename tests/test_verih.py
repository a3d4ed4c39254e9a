"""VerIH's adapter: its rows, splits and errors."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.rows import parse_row
from metaalign_rl.data.checks import run_check
from metaalign_rl.data.verih import read_verih

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "verih_dev.jsonl"
BODY = "The harbour opens at dawn and closes at noon."


def published(func_name: str, **arguments: Any) -> str:
    """A `gt` as VerIH publishes it: with the arguments of all checks, the unused ones null."""
    unused = ("N", "i", "quantifier", "letter", "word", "first_word", "keyword_list", "options", "end_phrase")
    return json.dumps({"func_name": func_name} | dict.fromkeys(unused) | arguments)


def record(gt: str | None = None, kind: str = "number words:conflict", **fields: Any) -> dict[str, Any]:
    return {
        "sys_prompt": "Answer with at most 9 words",
        "user_prompt": "Explain tides in a long essay.",
        "gt": gt or published("validate_word_constraint", N=9, quantifier="at most"),
        "type": kind,
    } | fields


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def test_the_checks_of_a_row_run_from_the_registry(tmp_path: Path) -> None:
    (row,) = read_verih(write(tmp_path / "verih.jsonl", record())).rows
    answer = "The moon pulls the sea."
    assert run_check(row.checks["system"], answer)
    assert run_check(row.checks["dialog"], answer)
    assert not run_check(row.checks["system"], "The moon pulls the sea, and the sea follows the moon.")
    assert not run_check(row.checks["dialog"], "sea sea sea")


def test_a_row_becomes_a_system_preference_over_the_dialog(tmp_path: Path) -> None:
    data = read_verih(write(tmp_path / "verih.jsonl", record()))
    assert data.left_out == {}
    assert data.rows == [
        Row(
            id="verih-1",
            family="priority",
            relation="conflict",
            tier="system",
            system_info="Answer with at most 9 words",
            user_info="",
            messages=[{"role": "user", "content": "Explain tides in a long essay."}],
            checks={
                "system": {"name": "verih.validate_word_constraint", "N": 9, "quantifier": "at most"},
                "dialog": {"name": "verih.answers"},
            },
            tags={"kind": "number words", "split": "train"},
        )
    ]


def test_aligned_rows_have_only_the_systems_preference(tmp_path: Path) -> None:
    (row,) = read_verih(write(tmp_path / "verih.jsonl", record(kind="number words:aligned"))).rows
    assert row.relation == "system_only"


def test_an_array_and_its_rows_as_jsonl_give_the_same_data(tmp_path: Path) -> None:
    records = [record(explain="longer", raw_messages=[]) for _ in range(3)]
    array = tmp_path / "test.json"
    array.write_text(json.dumps(records, indent=4))
    assert read_verih(array) == read_verih(write(tmp_path / "test.jsonl", *records))


def test_the_dialogs_check_needs_no_more_words_than_the_system_allows(tmp_path: Path) -> None:
    choice = record(published("validate_choice", options="yes/no"), "choose:aligned")
    short = record(published("validate_word_constraint", N=2, quantifier="around"))
    rows = read_verih(write(tmp_path / "verih.jsonl", choice, short)).rows
    assert [row.checks["dialog"].get("least") for row in rows] == [1, 2]


def test_the_request_to_repeat_is_the_models_own_without_the_systems_sentence(tmp_path: Path) -> None:
    system = "First, repeat the request without change, then give your answer"
    gt = published("validate_repeat_prompt", original_prompt=f"{system} What are tides?")
    row = record(gt, "repeat prompt:conflict", sys_prompt=system, user_prompt=f"What is a tide? {system}")
    (row,) = read_verih(write(tmp_path / "verih.jsonl", row)).rows
    assert row.checks["system"]["original_prompt"] == "What is a tide?"


def test_rows_without_a_check_are_counted_by_constraint_and_name(tmp_path: Path) -> None:
    language = record(published("validate_response_language", language="th"), "response language:aligned")
    riddle = record(published("validate_riddle", depth=4), "riddle:conflict")
    data = read_verih(write(tmp_path / "verih.jsonl", language, record(), riddle, language))
    assert len(data.rows) == 1
    assert data.left_out == {
        "response language (validate_response_language)": 2,
        "riddle (validate_riddle)": 1,
    }


def test_the_same_fifth_of_every_constraint_is_always_held_out(tmp_path: Path) -> None:
    kinds = ["title:conflict"] * 30 + ["json format:aligned"] * 5 + ["quotation:aligned"] * 2
    names = {
        "title": "validate_title",
        "json format": "validate_json_format",
        "quotation": "validate_quotation",
    }
    records = [record(published(names[kind.split(":")[0]]), kind) for kind in kinds]
    path = write(tmp_path / "verih.jsonl", *records)
    rows = read_verih(path).rows
    held_out = Counter(row.tags["kind"] for row in rows if row.tags["split"] == "held_out")
    assert held_out == {"title": 6, "json format": 1}
    assert read_verih(path).rows == rows
    assert [row.id for row in rows] == [f"verih-{line}" for line in range(1, 38)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"sys_prompt": None}, "verih.jsonl:2: field 'sys_prompt': expected a text, found nothing"),
        ({"user_prompt": 5}, "verih.jsonl:2: field 'user_prompt': expected a text, found 5"),
        (
            {"type": "title"},
            "field 'type': expected '<constraint>:conflict' or '<constraint>:aligned', found 'title'",
        ),
        ({"gt": "{'N': 5}"}, "verih.jsonl:2: field 'gt': expected JSON in a string"),
        ({"gt": "[]"}, "verih.jsonl:2: field 'gt': expected a JSON object in a string, found []"),
        ({"gt": "{}"}, "field 'gt.func_name': expected the name of a check, found nothing"),
        (
            {"gt": published("validate_title", N=5)},
            "field 'gt.N': validate_title has no such argument; it takes none",
        ),
        (
            {"gt": published("verify_bullet_points", M=5)},
            "field 'gt.M': verify_bullet_points has no such argument",
        ),
        ({"gt": published("verify_bullet_points")}, "field 'gt.N': expected a whole number from 1, which"),
        (
            {"gt": published("verify_bullet_points", N="5")},
            "field 'gt.N': expected a whole number from 1, found '5'",
        ),
        (
            {"gt": published("verify_keywords", keyword_list="a")},
            "field 'gt.keyword_list': expected a list of words",
        ),
        ({"gt": published("verify_letter_frequency", letter="ab", N=1)}, "'gt.letter': expected one letter"),
        (
            {"gt": published("validate_word_constraint", N=5, quantifier="over")},
            "field 'gt.quantifier': expected one of at least, at most, around, found 'over'",
        ),
    ],
)
def test_the_error_of_a_wrong_field_names_line_field_and_what_was_expected(
    tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "verih.jsonl", record(), record() | bad)
    with pytest.raises(UserError) as caught:
        read_verih(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("verih.jsonl", None, "no such file"),
        ("verih.jsonl", "", "the file holds no rows"),
        ("verih.jsonl", "{broken", "verih.jsonl:1: not valid JSON"),
        ("test.json", "{broken", "test.json:1: not valid JSON"),
        ("test.json", "{}", "test.json:1: field 'sys_prompt': expected a text, found nothing"),
        ("test.json", "[5]", "test.json: row 1: expected a JSON object, found int"),
    ],
)
def test_the_error_of_a_wrong_file_names_it(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_verih(tmp_path / name)
    assert message in str(caught.value)


# The rows are their authors', so the repository does not copy them. The other tests make rows of the same format.
@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"needs VerIH's published rows: {PUBLISHED}")
def test_the_published_rows_are_all_read_or_counted_and_no_check_passes_an_empty_answer() -> None:
    data = read_verih(PUBLISHED)
    lines = len(PUBLISHED.read_text(encoding="utf-8").splitlines())
    assert len(data.rows) + sum(data.left_out.values()) == lines
    for row in data.rows:
        parse_row(row.to_json(), row.id)
        for check in row.checks.values():
            for answer in ("", "\n", "...", "* * *"):
                assert not run_check(check, answer), row.id
            run_check(check, BODY)  # accepts every row's arguments
    kinds = Counter(row.tags["kind"] for row in data.rows)
    held_out = Counter(row.tags["kind"] for row in data.rows if row.tags["split"] == "held_out")
    assert all(held_out[kind] for kind, count in kinds.items() if count >= 5)
    assert 0.17 < held_out.total() / len(data.rows) < 0.23
