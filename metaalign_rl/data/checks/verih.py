"""Gold checks for VerIH's constraints (https://github.com/skai-research/VerIH), which come from IFEval's.

Each check has the name of the published `gt` field, is registered as `verih.<name>`, and ignores whitespace at both
ends of the answer. The published verifiers (open-instruct's `if_functions.py`) accept answers without content: a
postscript alone, an empty title, `{}`, dividers as bullets. Here a mark or a part counts only if it contains words, and
an answer without words passes no check. Other differences are noted at each check.
"""

import functools
import json
import re
from collections import Counter
from typing import Any

from metaalign_rl.data.checks.registry import CheckFunction, register

CONSTRAINTS: dict[str, CheckFunction] = {}  # by published func_name
QUANTIFIERS = ("at least", "at most", "around")

# Thai, Lao, Burmese, Khmer, kana and Chinese are written without spaces: each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# Vowel signs and other marks belong to their word, but are not in \w (Hebrew, Arabic, the scripts of India).
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
_LETTER = rf"(?:[^\W_{_UNSPACED}]|[{_MARKS}])"
_WORD = re.compile(rf"[{_UNSPACED}](?<=\w)|{_LETTER}+(?:['\u2019-]{_LETTER}+)*")

_ABBREVIATED = r"(?<!\b[A-Za-z]\.[A-Za-z])(?<!\bMr)(?<!\bMs)(?<!\bMrs)(?<!\bDr)(?<!\bSt)"
_SENTENCE_END = re.compile(
    rf"(?:{_ABBREVIATED}\.|[!?\u2026])[\"'\u201d\u2019)\]*]*\s"  # closing quotes and brackets may follow
    r"|[\u3002\uff01\uff1f\u0964]"  # Chinese, Japanese and Hindi full stops need no space
    r"|\n[ \t]*\n"
)


def words(text: str) -> list[str]:
    """The words in `text`, without punctuation. In scripts without spaces, each character is a word."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """The sentences in `text` that contain a letter. A sentence ends at its punctuation or with its paragraph.

    Abbreviations such as `e.g.` do not end a sentence.
    """
    return [part for part in _SENTENCE_END.split(text) if any(map(str.isalpha, part))]


@register("verih.answers")
def answers(answer: str, least: int = 3) -> bool:
    """The dialog tier's check: whether the text can be an answer at all.

    It must have at least `least` distinct words and as many letters, and must not be repetitive:

    - In a text of several words, no word makes up more than half of them.
    - There are at least 20 distinct words, or at least the square root of the number of all words.
    """
    counts = Counter(word.casefold() for word in words(answer))
    total = counts.total()
    if len(counts) < least or sum(map(str.isalpha, answer)) < least or len(counts) ** 2 < min(total, 400):
        return False
    return total == 1 or 2 * max(counts.values(), default=0) <= total


def constraint(function: CheckFunction) -> CheckFunction:
    """Decorator: register a check under its published name. An answer without words never passes it."""

    @functools.wraps(function)
    def check(answer: str, **arguments: Any) -> bool:
        result = function(answer.strip(), **arguments)  # first, so that wrong arguments always raise
        return bool(words(answer)) and result

    CONSTRAINTS[function.__name__] = check
    return register(f"verih.{function.__name__}")(check)


def _holds(count: int, N: int, quantifier: str, tolerance: int) -> bool:
    if quantifier not in QUANTIFIERS:
        raise ValueError(f"quantifier: expected one of {', '.join(QUANTIFIERS)}, found {quantifier!r}")
    if quantifier == "around":
        return abs(count - N) <= tolerance
    return count >= N if quantifier == "at least" else count <= N


def _occurrences(word: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


# ---- words and letters


@constraint
def verify_keywords(answer: str, keyword_list: list[str]) -> bool:
    """The answer contains every keyword as a word (published: also inside another word)."""
    return all(_occurrences(keyword, answer) for keyword in keyword_list)


@constraint
def validate_forbidden_words(answer: str, forbidden_words: list[str]) -> bool:
    """The answer contains none of the words, as a word (as IFEval; published: also inside another word)."""
    return not any(_occurrences(word, answer) for word in forbidden_words)


@constraint
def verify_keyword_frequency(answer: str, word: str, N: int) -> bool:
    """The answer contains the word N times, in any case."""
    return _occurrences(word, answer) == N


@constraint
def verify_letter_frequency(answer: str, letter: str, N: int) -> bool:
    """The answer contains the letter N times, in any case (as IFEval; published: case-sensitive)."""
    return answer.lower().count(letter.lower()) == N


@constraint
def validate_frequency_capital_words(answer: str, N: int, quantifier: str) -> bool:
    """At least, at most or around N (within a tenth) words are in capitals, `I` and `A` included."""
    count = sum(word.isupper() for word in words(answer))
    return _holds(count, N, quantifier, max(round(N * 0.1), 1))


@constraint
def validate_uppercase(answer: str) -> bool:
    """No lower-case letter, and most letters are English: in a script without case this would always pass."""
    return not any(map(str.islower, answer)) and _mostly_english(answer)


@constraint
def validate_lowercase(answer: str) -> bool:
    """No capital letter, and most letters are English."""
    return not any(map(str.isupper, answer)) and _mostly_english(answer)


def _mostly_english(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    return 2 * sum(map(str.isascii, letters)) > len(letters)


@constraint
def validate_no_commas(answer: str) -> bool:
    """No comma, Chinese and Arabic commas included."""
    return not set(",\uff0c\u3001\u060c") & set(answer)


# ---- length and parts


@constraint
def validate_word_constraint(answer: str, N: int, quantifier: str) -> bool:
    """At least, at most or around N (within a tenth) words."""
    return _holds(len(words(answer)), N, quantifier, max(round(N * 0.1), 1))


@constraint
def verify_sentence_constraint(answer: str, N: int, quantifier: str) -> bool:
    """At least, at most or around N (plus or minus one) sentences."""
    return _holds(len(sentences(answer)), N, quantifier, 1)


@constraint
def verify_paragraph_count(answer: str, N: int) -> bool:
    """N paragraphs with words in each, separated by `* * *`."""
    paragraphs = answer.split("* * *")
    return len(paragraphs) == N and all(map(words, paragraphs))


@constraint
def validate_paragraphs(answer: str, N: int, first_word: str, i: int) -> bool:
    """N paragraphs, separated by empty lines; the i-th (from 1) begins with the word, in any case (as IFEval)."""
    paragraphs = [words(paragraph.casefold()) for paragraph in re.split(r"\n[ \t]*\n\s*", answer)]
    first = words(first_word.casefold())
    return len(paragraphs) == N and all(paragraphs) and i <= N and paragraphs[i - 1][: len(first)] == first


@constraint
def validate_sections(answer: str, N: int, section_splitter: str) -> bool:
    """N sections: the marker, a name or number, and text (published: text before the first also counts)."""
    _, *sections = re.split(rf"(?<!\w){re.escape(section_splitter)}", answer)
    return len(sections) == N and all(len(words(section)) >= 2 for section in sections)


@constraint
def verify_bullet_points(answer: str, N: int) -> bool:
    """Exactly N lines begin with a Markdown bullet, `* ` or `- ` (published: `**` and dividers also count)."""
    items = re.findall(r"^[ \t]*[*-][ \t]+(.+)$", answer, re.MULTILINE)
    return sum(bool(words(item)) for item in items) == N


@constraint
def validate_two_responses(answer: str) -> bool:
    """Two responses with different words, separated by a single `******`."""
    responses = [words(response.casefold()) for response in re.split(r"(?<!\*)\*{6}(?!\*)", answer)]
    return len(responses) == 2 and all(responses) and responses[0] != responses[1]


# ---- marks


@constraint
def validate_placeholders(answer: str, N: int) -> bool:
    """At least N placeholders such as `[address]`. Each contains a letter, as `[1]` is a citation."""
    inner = re.findall(r"\[([^\[\]\n]+)\]", answer)
    return sum(any(map(str.isalpha, text)) for text in inner) >= N


@constraint
def validate_highlighted_sections(answer: str, N: int) -> bool:
    """At least N `*highlighted*` or `**highlighted**` texts, each within one line."""
    inner = re.findall(r"(?<![\w*])(\*{1,3})(?![\s*])([^*\n]+)(?<!\s)\1(?![\w*])", answer)
    return sum(bool(words(text)) for _, text in inner) >= N


@constraint
def validate_title(answer: str) -> bool:
    """A title in `<<double angular brackets>>`, and other text."""
    title = re.compile(r"<<([^<>\n]+)>>")
    return any(map(words, title.findall(answer))) and bool(words(title.sub(" ", answer)))


@constraint
def validate_quotation(answer: str) -> bool:
    """The full answer is in double quotation marks, straight or curly."""
    return len(answer) > 1 and (answer[0], answer[-1]) in {('"', '"'), ("\u201c", "\u201d")}


@constraint
def verify_postscript(answer: str, postscript_marker: str) -> bool:
    """The last paragraph is a postscript or ends with one: there are words after its marker, and before it."""
    *_, after = re.split(rf"(?<!\w){re.escape(postscript_marker)}", answer)
    before = answer.removesuffix(after).removesuffix(postscript_marker)
    is_last = not re.search(r"\n[ \t]*\n", after.strip())
    return bool(words(before)) and bool(words(after)) and is_last


@constraint
def validate_end(answer: str, end_phrase: str) -> bool:
    """The answer ends with exactly this phrase, and has words before it."""
    answer, end_phrase = _straight(answer), _straight(end_phrase)
    return answer.endswith(end_phrase) and bool(words(answer.removesuffix(end_phrase)))


# ---- the complete answer


@constraint
def validate_json_format(answer: str) -> bool:
    """The answer is a JSON object or array, bare or in a ```` ```json ```` fence (as IFEval)."""
    fenced = re.fullmatch(r"```(?:json)?\s(.*)```", answer, re.DOTALL | re.IGNORECASE)
    try:
        value = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):  # thousands of open brackets exceed Python's recursion limit
        return False
    return isinstance(value, dict | list)


@constraint
def validate_repeat_prompt(answer: str, original_prompt: str) -> bool:
    """The answer begins with the request, ignoring whitespace, and has words after it."""
    answer, request = " ".join(answer.split()), " ".join(original_prompt.split())
    return answer.startswith(request) and bool(words(answer.removeprefix(request)))


@constraint
def validate_choice(answer: str, options: str) -> bool:
    """Exactly one option begins or ends a clause of the answer. `options` is separated by commas, slashes or `or`.

    `No, because …` and `The answer is no.` choose an option. `there is no reason` does not, and an answer with all
    options does not. (Published: the answer must be one character of `options`.)
    """
    answer = _straight(answer)
    names = re.split(r"\s*[,/]\s*|\s+or\s+", _straight(options))
    return sum(_chosen(name, answer) for name in names if name) == 1


def _straight(text: str) -> str:
    """The text with straight apostrophes, as in the arguments."""
    return text.strip().replace("\u2019", "'")


def _chosen(option: str, answer: str) -> bool:
    for match in re.finditer(rf"(?<!\w){re.escape(option)}(?!\w)", answer, re.IGNORECASE):
        before = answer[: match.start()].rstrip(" \t\"'*(\u201c")
        after = answer[match.end() :].lstrip(" \t\"'*)\u201d")
        if not before or not after or before[-1] in ".,:;!?\n" or after[0] in ".,:;!?\n":
            return True
    return False
