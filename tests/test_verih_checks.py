"""VerIH's gold checks: answers that keep a constraint, answers that break it, and texts that are no answers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaalign_rl.data.checks.verih import CONSTRAINTS, answers, sentences, words

BODY = "The harbour opens at dawn and closes at noon."

# Name, arguments, answers that keep the constraint, and answers that break it.
EXAMPLES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "verify_keywords",
        {"keyword_list": ["lantern", "orchard"]},
        ["A Lantern hangs in the orchard."],
        ["A lantern hangs in the barn.", "Lanterns hang in the orchard."],
    ),
    (
        "validate_forbidden_words",
        {"forbidden_words": ["lantern", "barn"]},
        [BODY, "Barnacles grow on the pier."],
        ["The BARN is red.", "Light a lantern, please."],
    ),
    (
        "verify_keyword_frequency",
        {"word": "wart", "N": 2},
        ["A wart is a Wart, not a warthog."],
        ["A wart.", "A wart, a wart and a wart."],
    ),
    (
        "verify_letter_frequency",
        {"letter": "e", "N": 3},
        ["An eel swam east.", "Even elk"],
        ["An eel.", "Even eels."],
    ),
    (
        "validate_frequency_capital_words",
        {"N": 2, "quantifier": "at least"},
        ["NASA and ESA agree.", "NASA, ESA and I agree."],
        ["NASA agrees.", "Nasa and Esa agree."],
    ),
    (
        "validate_frequency_capital_words",
        {"N": 2, "quantifier": "at most"},
        ["NASA agrees with ESA."],
        ["NASA, ESA and JAXA agree."],
    ),
    (
        "validate_frequency_capital_words",
        {"N": 20, "quantifier": "around"},
        ["We say " + "NO " * 18, "We say " + "NO " * 22],
        ["We say " + "NO " * 17, "We say " + "NO " * 23],
    ),
    ("validate_uppercase", {}, ["IT OPENS AT 5.", "LE CAFÉ OPENS."], [BODY, "IT opens.", "港口开放。", "5!"]),
    ("validate_lowercase", {}, ["it opens at 5."], [BODY, "港口开放。", "5!"]),
    ("validate_no_commas", {}, [BODY], ["Dawn, noon and dusk.", "你好\uff0c世界"]),
    (
        "validate_word_constraint",
        {"N": 3, "quantifier": "at least"},
        ["It opens today.", "今天开放", "It's well-known today."],
        ["It opens.", "- - it -"],
    ),
    ("validate_word_constraint", {"N": 3, "quantifier": "at most"}, ["It opens today."], [BODY]),
    (
        "validate_word_constraint",
        {"N": 3, "quantifier": "around"},
        ["It opens.", "It opens today.", "It opens again today."],
        ["It.", BODY],
    ),
    (
        "verify_sentence_constraint",
        {"N": 2, "quantifier": "at least"},
        ["It opens. It closes!", "它开放。它关闭。", "A heading\n\nA text"],
        ["It opens", "See Dr. Brown, e.g. today.", "1. It opens."],
    ),
    (
        "verify_sentence_constraint",
        {"N": 2, "quantifier": "at most"},
        ["It opens. It closes."],
        ["It. Is. Open."],
    ),
    (
        "verify_sentence_constraint",
        {"N": 3, "quantifier": "around"},
        ["It opens. It closes.", 'He said "now." She left. I stayed. We slept.'],
        ["It opens.", "One. Two. Three. Four. Five."],
    ),
    (
        "verify_paragraph_count",
        {"N": 2},
        ["It opens.\n* * *\nIt closes."],
        ["It opens.", "It opens.\n* * *\n", "It opens.\n\nIt closes.", "A\n* * *\nB\n* * *\nC"],
    ),
    (
        "validate_paragraphs",
        {"N": 2, "first_word": "cold", "i": 2},
        ["It opens.\n\nCold water flows.", "It opens.\n  \n\n**cold** water"],
        ["It opens.\n\nColder water flows.", "It opens.\nCold water.", "A\n\nIt\n\nCold", "Cold\n\nA"],
    ),
    ("validate_paragraphs", {"N": 2, "first_word": "cold", "i": 3}, [], ["It opens.\n\nCold water flows."]),
    (
        "validate_sections",
        {"N": 2, "section_splitter": "Part:"},
        ["Part: 1\nIt opens.\nPart: 2\nIt closes.", "Hello.\n\n## Part: 1 Dawn\n\n## Part: 2 Noon"],
        ["Part: 1\nIt opens.", "Part: 1\nPart: 2", "Part 1\nIt opens.\nPart 2\nIt closes."],
    ),
    (
        "verify_bullet_points",
        {"N": 2},
        ["* dawn\n* noon", "Times:\n- dawn\n  - noon\n"],
        ["* dawn", "* dawn\n* noon\n* dusk", "**dawn**\n**noon**", "* dawn\n* * *", "*\n*"],
    ),
    (
        "validate_two_responses",
        {},
        ["It opens.\n******\nIt closes."],
        ["It opens.", "A ****** B ****** C", "Open\n******\nOPEN", "******\nIt opens.", "A *** B"],
    ),
    (
        "validate_placeholders",
        {"N": 2},
        ["Dear [name], come to [address]."],
        ["Dear [name].", "It opens [1] and closes [2].", "[] and []", "[name, [ ]"],
    ),
    (
        "validate_highlighted_sections",
        {"N": 2},
        ["It *opens* and **closes**.", "* It *opens*\n* It *closes*"],
        ["It *opens*.", "** and **", "* It opens\n* It closes *", "2*3*4*5"],
    ),
    ("validate_title", {}, [f"<<Hours>>\n{BODY}"], [BODY, f"<<>>\n{BODY}", "<<The hours of the harbour>>"]),
    ("validate_quotation", {}, [f'"{BODY}"', f' "{BODY}"\n', "“It opens.”"], [BODY, f'"{BODY}', '"', '""']),
    (
        "verify_postscript",
        {"postscript_marker": "PS:"},
        [f"{BODY}\n\nPS: Bring a coat.", f"{BODY} **PS:** Bring a coat."],
        [BODY, "PS: Bring a coat.", f"{BODY}\n\nPS:", f"{BODY} The GPS: on", f"Hi. PS: Bring it.\n\n{BODY}"],
    ),
    (
        "validate_end",
        {"end_phrase": "That's all."},
        [f"{BODY} That's all.", f"{BODY}\n\nThat\u2019s all.\n"],
        [BODY, "That's all.", f"{BODY} That's all. Bye.", f"{BODY} that's all."],
    ),
    (
        "validate_json_format",
        {},
        ['{"opens": "dawn"}', '["dawn", "noon"]', '```json\n{"opens": "dawn"}\n```'],
        ["{}", '"dawn"', "5", BODY, '{"opens": "dawn"', 'Here: {"opens": "dawn"}', "[" * 100_000],
    ),
    (
        "validate_repeat_prompt",
        {"original_prompt": "When does it\nopen?"},
        ["When does it open? At dawn."],
        ["When does it open?", "At dawn.", "When does it end? At dawn.", "Hi! When does it open? At dawn."],
    ),
    (
        "validate_choice",
        {"options": "yes/no/maybe"},
        ["yes", "No, because it is closed.", "The answer is: maybe", "My answer is no. There is no doubt."],
        ["yes/no/maybe", "Yes. Or no.", "There is no doubt about it.", "Nobody knows.", BODY],
    ),
    (
        "validate_choice",
        {"options": "a), b), c), d)"},
        ["b)", "b) The harbour", "I choose (b)."],
        ["a), b), c), d)", "e)", "b) or c)", BODY],
    ),
    (
        "validate_choice",
        {"options": "I know or I don't know"},
        ["I know", "I don\u2019t know.", "I know, since the harbour opens at dawn."],
        ["I know or I don't know", "I do not know", BODY],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), EXAMPLES)
def test_a_check_passes_answers_that_keep_its_constraint_and_no_others(
    name: str, arguments: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    for answer in good:
        assert CONSTRAINTS[name](answer, **arguments), answer
    for answer in bad:
        assert not CONSTRAINTS[name](answer, **arguments), answer


def test_every_check_has_examples() -> None:
    assert {name for name, *_ in EXAMPLES} == set(CONSTRAINTS)
    assert len(CONSTRAINTS) == 24


@pytest.mark.parametrize(
    "answer",
    [BODY, "It is open.", "港口今天开放", "Порт открыт сегодня", "बंदरगाह आज खुला है", '{"opens": "at dawn"}'],
)
def test_an_answer_has_three_distinct_words(answer: str) -> None:
    assert answers(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n\t",
        "...",
        "1 2 3 4",
        "please please",
        "yes no yes",
        "no no no no no maybe yes",
        "是是是是",
        "the cat sat " * 5,
    ],
)
def test_empty_texts_marks_and_repetitions_are_no_answers(answer: str) -> None:
    assert not answers(answer)


def test_one_word_is_an_answer_if_one_is_asked_for_but_not_when_repeated() -> None:
    assert answers("yes", least=1)
    assert answers("b)", least=1)
    assert not answers("yes yes", least=1)
    assert not answers("...", least=1)


SPECS = [(name, arguments) for name, arguments, *_ in EXAMPLES]
A_WORD = st.text(st.characters(categories=["Lu", "Ll"]), min_size=1, max_size=9)
DIVIDERS = st.sampled_from([" ", "\n", "\n\n", ", ", ". ", "\n* * *\n", " ****** ", "] ["])


@given(st.sampled_from(SPECS), st.text(alphabet=" \t\n\r\u00a0.,;:!?*_-[]<>{}\"'`", max_size=40))
def test_no_check_passes_an_answer_without_words(spec: tuple[str, dict[str, Any]], answer: str) -> None:
    name, arguments = spec
    assert not CONSTRAINTS[name](answer, **arguments)
    assert not answers(answer, least=1)


@given(A_WORD, st.integers(min_value=2, max_value=60), DIVIDERS)
def test_a_repeated_word_is_no_answer_with_any_divider(word: str, times: int, divider: str) -> None:
    assert not answers(divider.join([word] * times), least=1)


@given(st.sampled_from(SPECS), st.text())
def test_checks_return_a_result_for_any_text(spec: tuple[str, dict[str, Any]], answer: str) -> None:
    name, arguments = spec
    assert CONSTRAINTS[name](answer, **arguments) in (True, False)


def test_words_keep_their_apostrophes_and_vowel_signs() -> None:
    assert words("It's a well-known 'fact'!") == ["It's", "a", "well-known", "fact"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]
    assert words("GPT你好") == ["GPT", "你", "好"]


def test_sentences_end_at_their_punctuation_or_paragraph() -> None:
    assert len(sentences("Mr. Ray, i.e. the owner, left at 5.30. Why? (Who knows.) No!")) == 4
