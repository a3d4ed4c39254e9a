"""Scoring texts that begin alike: the shared part once, and the same scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reward_toys import make_row, reward_model

from reward import Scorer
from reward.prefixes import Group, group_by_prefix, shared_batches

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=20)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.from_pretrained(reward_model(), device="cpu")


@given(TEXTS)
def test_every_text_is_in_one_group_whose_beginning_it_has_and_keeps_a_token_of_its_own(texts: list[list[int]]) -> None:
    groups = list(group_by_prefix(texts))
    assert sorted(index for group in groups for index in group.members) == list(range(len(texts)))
    for group in groups:
        first = texts[group.members[0]]
        for index in group.members:
            assert texts[index][: group.shared] == first[: group.shared]
            assert len(texts[index]) > group.shared


@given(TEXTS, st.integers(1, 60))
def test_batches_hold_every_shared_text_once_and_no_more_tokens_than_they_may(
    texts: list[list[int]], batch_tokens: int
) -> None:
    groups = [group for group in group_by_prefix(texts) if group.shared]
    batches = list(shared_batches(groups, texts, batch_tokens))
    members = [index for batch in batches for index in batch.members]
    assert sorted(members) == sorted(index for group in groups for index in group.members)
    for batch in batches:
        tails = [len(texts[index]) - group.shared for group in batch.groups for index in group.members]
        tokens = len(batch.groups) * max(group.shared for group in batch.groups) + len(tails) * max(tails)
        assert tokens <= batch_tokens or len(tails) == 1


def test_answers_to_one_prompt_share_it() -> None:
    prompt = list(range(50))
    texts = [[*prompt, 100 + number] for number in range(4)]
    assert list(group_by_prefix(texts)) == [Group(50, [0, 1, 2, 3])]
    assert [group.shared for group in group_by_prefix([[1, 2, 3], [4, 5, 6]])] == [0, 0]


def test_a_shared_beginning_changes_no_score(scorer: Scorer) -> None:
    rows = [
        make_row(system_info=f"say {color}", messages=[{"role": "user", "content": "what color is it now " * turns}],
                 response="red " * length)
        for turns in (1, 3) for color in ("red", "blue") for length in (1, 2, 5, 9)
    ]  # fmt: skip
    texts = [scorer.encode(row, "row") for row in rows]
    assert any(group.shared for group in group_by_prefix(texts))
    alone = torch.cat([scorer.logits([text]) for text in texts])
    for batch_tokens in (40, 200, 10_000):
        assert torch.allclose(scorer.logits(texts, batch_tokens=batch_tokens), alone, atol=1e-5)
