"""Batches: masks, selecting and joining, and the split over ranks and micro-batches."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_toys import make_samples

from metaalign_rl.core.batching import ENOUGH
from metaalign_rl.learner.batch import concat, make_batch
from metaalign_rl.learner.micro_batches import model_inputs, plan_batch, plan_micro_batches


def test_a_batch_marks_the_positions_that_predict_response_tokens():
    batch = make_batch([([5, 6], [7]), ([8], [9, 3, 4])], pad_id=0, rollout_logprobs=[[-1.0], [-2, -3, -4]])
    assert batch.sequences.tolist() == [[5, 6, 7, 0], [8, 9, 3, 4]]
    assert batch.attention_mask.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.action_mask.tolist() == [[False, True, False], [True, True, True]]
    assert batch.rollout_logprobs.tolist() == [[0, -1, 0], [-2, -3, -4]]
    assert (batch.lengths(), batch.response_tokens()) == ([3, 4], 4)


def test_selected_samples_are_cut_to_their_longest():
    batch = make_batch([([5, 6], [7]), ([8], [9, 3, 4])], pad_id=1)
    first = batch.select([0])
    assert first.sequences.tolist() == [[5, 6, 7]]
    assert first.action_mask.tolist() == [[False, True]]
    assert first.values is None


def test_batches_are_joined_and_padded_to_the_longest():
    samples = make_samples(5)
    whole = make_batch(samples, pad_id=0, rollout_logprobs=[[-1.0] * len(answer) for _, answer in samples])
    joined = concat([whole.select([0, 1]), whole.select([2]), whole.select([3, 4])])
    for name in ("sequences", "attention_mask", "action_mask", "rollout_logprobs"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    assert joined.values is None


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),  # also fewer than ranks
    ranks=st.integers(1, 4),
    tokens=st.integers(1, 120),
)
@settings(deadline=None)
def test_a_plan_holds_each_sample_once_and_keeps_ranks_in_step(lengths, ranks, tokens):
    plan = plan_micro_batches(lengths, range(len(lengths)), ranks, tokens, enough=50)
    assert len({len(share) for share in plan}) == 1
    micro_batches = [micro for share in plan for micro in share]
    counted = [index for micro in micro_batches if not micro.filler for index in micro.indices]
    assert sorted(counted) == list(range(len(lengths)))
    for micro in micro_batches:
        padded = max(lengths[index] for index in micro.indices) * len(micro.indices)
        assert padded <= tokens or len(micro.indices) == 1


def test_micro_batches_have_little_padding():
    draw = random.Random(0)
    lengths = [draw.randint(10, 200) for _ in range(512)]
    for ranks in (1, 2, 4):
        plan = plan_micro_batches(lengths, range(512), ranks, max_tokens=16384, enough=ENOUGH)
        sizes = [
            sum(max(lengths[index] for index in micro.indices) * len(micro.indices) for micro in share)
            for share in plan
        ]
        assert sum(sizes) < 1.15 * sum(lengths)
        assert max(sizes) < 1.01 * sum(sizes) / ranks


def test_responses_that_share_a_prompt_stay_together_up_to_the_token_limit():
    samples = [(prompt, response) for _, response in make_samples(4) for prompt, _ in make_samples(4)]
    batch = make_batch(samples, pad_id=0)
    for ranks in (1, 2):
        plan = plan_batch(batch, range(16), ranks, max_tokens=40, enough=40, share_prompts=True)
        found = [sorted(micro.indices) for share in plan for micro in share if not micro.filler]
        assert sorted(row for rows in found for row in rows) == list(range(16))
        for rows in found:
            assert model_inputs(batch.select(rows), share_prompts=True).input_ids.numel() <= 40
        assert len(found) < 16
    few = plan_batch(
        batch, [0, 4], ranks=2, max_tokens=40, enough=40, share_prompts=True
    )  # one prompt, and no rank may be idle
    assert [share[0].indices for share in few] in ([[0], [4]], [[4], [0]])
