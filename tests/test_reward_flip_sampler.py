"""The order in which the reward model's rows are trained on."""

import pytest

from reward.training.flip_sampler import FILLER, FlipSampler


def sampler_of(count, lengths=None, groups=None, **arguments):
    """The order of `count` rows, by default of equal length and without flips."""
    groups = groups or [str(index) for index in range(count)]
    return FlipSampler(lengths or [5] * count, groups, batch_size=8, seed=0, **arguments)


def test_an_epoch_has_every_row_once_and_its_own_order():
    sampler = sampler_of(100, lengths=list(range(100)))
    first, repeated = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == repeated != second
    assert sorted(first) == sorted(second) == list(range(100))


def test_the_rows_of_a_flip_are_adjacent():
    flips = [str(index // 2) for index in range(100)]
    order = list(sampler_of(100, groups=flips))
    assert all(flips[one] == flips[other] for one, other in zip(order[::2], order[1::2], strict=True))


def test_pairs_of_a_right_and_a_wrong_answer_come_first():
    first = list(range(0, 200, 2))
    order = list(sampler_of(200, first=first))
    assert sorted(order[:96]) == sorted(set(order[:96]) & set(first))  # a window of 12 batches
    assert sorted(order) == list(range(200))


@pytest.mark.parametrize(("rows", "fillers"), [(96, 0), (97, 7), (7, 1), (1, 7)])
def test_an_epoch_is_extended_so_that_devices_get_equal_shares(rows, fillers):
    order = sampler_of(rows, multiple=8)
    assert len(order) == len(list(order)) == rows + fillers
    assert list(order)[rows:] == [FILLER] * fillers
    assert list(order)[:rows] == list(sampler_of(rows))
