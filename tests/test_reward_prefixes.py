"""Which texts begin alike."""

from hypothesis import given
from hypothesis import strategies as st

from reward.prefixes import Group, group_by_prefix

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=20)


@given(TEXTS)
def test_every_text_is_in_one_group_whose_beginning_it_has_and_keeps_a_token_of_its_own(texts: list[list[int]]) -> None:
    groups = list(group_by_prefix(texts))
    assert sorted(index for group in groups for index in group.members) == list(range(len(texts)))
    for group in groups:
        first = texts[group.members[0]]
        for index in group.members:
            assert texts[index][: group.shared] == first[: group.shared]
            assert len(texts[index]) > group.shared


def test_answers_to_one_prompt_share_it() -> None:
    prompt = list(range(50))
    texts = [[*prompt, 100 + number] for number in range(4)]
    assert list(group_by_prefix(texts)) == [Group(50, [0, 1, 2, 3])]
    assert [group.shared for group in group_by_prefix([[1, 2, 3], [4, 5, 6]])] == [0, 0]
