"""Groups of texts with a common prefix."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from reward.inference.prefixes import PrefixGroup, _best_runs, _shared_length, group_by_prefix

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=20)


@given(TEXTS)
def test_every_text_is_in_one_group_with_its_prefix_and_keeps_a_token(texts: list[list[int]]) -> None:
    groups = list(group_by_prefix(texts))
    assert sorted(index for group in groups for index in group.members) == list(range(len(texts)))
    for group in groups:
        first = texts[group.members[0]]
        for index in group.members:
            assert texts[index][: group.shared] == first[: group.shared]
            assert len(texts[index]) > group.shared


@given(TEXTS)
def test_no_other_runs_of_sorted_texts_save_more_tokens(texts: list[list[int]]) -> None:
    order = sorted(texts)[:7]

    def saved(start: int, end: int) -> int:
        shared = min((_shared_length(one, other) for one, other in pairwise(order[start:end])), default=0)
        return shared * (end - start - 1)

    def most(start: int) -> int:
        ends = range(start + 1, len(order) + 1)
        return max((saved(start, end) + most(end) for end in ends), default=0)

    runs = _best_runs([_shared_length(one, other) for one, other in pairwise(order)]) if order else []
    assert sum(saved(*run) for run in runs) == most(0)


def test_an_unrelated_text_does_not_change_the_other_groups() -> None:
    prompts = [[1, 2, 3, *range(10 * number, 10 * number + 40)] for number in (4, 5, 6)]
    texts = [[1, 2, 3, 0], *([*prompt, 100 + answer] for prompt in prompts for answer in range(8))]
    assert sorted((group.shared, len(group.members)) for group in group_by_prefix(texts)) == [(0, 1), *[(43, 8)] * 3]


def test_answers_to_one_prompt_share_the_prompt() -> None:
    prompt = list(range(50))
    texts = [[*prompt, 100 + number] for number in range(4)]
    assert list(group_by_prefix(texts)) == [PrefixGroup(50, [0, 1, 2, 3])]
    assert [group.shared for group in group_by_prefix([[1, 2, 3], [4, 5, 6]])] == [0, 0]
