"""Weight updates: packing, checksums, and the errors that a stale engine raises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metaalign_rl.weights import StaleEngine, assert_fresh, confirm, mismatch, pack, unpack

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64]


@st.composite
def named_tensors(draw: st.DrawFn) -> list[tuple[str, torch.Tensor]]:
    """Tensors of any shape (scalars and empty ones too) and bit pattern (NaN too), some not contiguous."""
    names = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=6))
    tensors = []
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        size = math.prod(shape) * dtype.itemsize
        raw = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
        tensor = raw.view(dtype).view(shape)
        tensors.append((name, tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor))
    return tensors


def bits(tensor: torch.Tensor) -> list[int]:
    """A tensor's bytes: NaN equals itself here."""
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


@settings(max_examples=200, deadline=None)
@given(tensors=named_tensors(), bucket_bytes=st.integers(1, 300), version=st.integers(0, 2**40))
def test_unpacking_gives_back_what_was_packed_in_buckets_of_any_size(tensors, bucket_bytes, version):
    update = pack(iter(tensors), version, bucket_bytes)
    unpacked = list(unpack(update))

    assert update.version == version
    assert [name for name, _ in unpacked] == [name for name, _ in tensors]
    for (_, found), (_, original) in zip(unpacked, tensors, strict=True):
        assert found.dtype == original.dtype
        assert found.shape == original.shape
        assert bits(found) == bits(original)
    assert update.checksum == pack(unpacked, 1).checksum == pack(reversed(tensors), 1).checksum
    for index, bucket in enumerate(update.buckets):
        filled = [entry for entry in update.entries if entry.bucket == index and math.prod(entry.shape) > 0]
        assert bucket.size <= bucket_bytes or len(filled) == 1


def test_a_packed_tensor_is_a_copy_that_later_training_steps_do_not_change():
    weight = torch.zeros(3)
    update = pack([("w", weight)], version=1)
    weight += 1
    assert dict(unpack(update))["w"].tolist() == [0, 0, 0]


def test_read_only_buckets_such_as_ray_returns_are_read_in_place_and_without_a_warning(recwarn):
    update = pack([("w", torch.arange(4.0))], version=1)
    update.buckets[0].flags.writeable = False
    tensor = dict(unpack(update))["w"]
    assert tensor.data_ptr() == update.buckets[0].ctypes.data
    assert not recwarn.list


BASE = [("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor([[3.0, 4.0]]))]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param([("a", torch.tensor([1.0, 2.0])), ("c", torch.tensor([[3.0, 4.0]]))], id="name"),
        pytest.param([("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor([3.0, 4.0]))], id="shape"),
        pytest.param([("a", torch.tensor([1.0, 2.0]).view(torch.int32)), BASE[1]], id="dtype"),
        pytest.param([("a", torch.tensor([1.0, 2.0000002])), BASE[1]], id="last bit"),
        pytest.param(BASE[:1], id="missing"),
        pytest.param([("a", torch.tensor([3.0, 4.0])), ("b", torch.tensor([[1.0, 2.0]]))], id="swapped"),
    ],
)
def test_the_checksum_sees_every_difference(other):
    assert pack(other, version=1).checksum != pack(BASE, version=1).checksum


def test_an_engine_that_answers_with_the_update_s_version_and_checksum_is_confirmed():
    update = pack(BASE, version=3)
    confirm(update, 3, update.checksum)


def test_an_engine_that_answers_with_another_version_or_checksum_is_named_with_what_was_expected_and_found():
    update = pack(BASE, version=3)
    with pytest.raises(StaleEngine, match="engine 1 did not take weight update 3: expected version 3, found 2"):
        confirm(update, 2, update.checksum, engine="engine 1")
    with pytest.raises(StaleEngine, match=f"expected checksum {update.checksum}, found 00"):
        confirm(update, 3, "00", engine="engine 1")


def test_mismatch_is_the_mean_absolute_difference_a_token_over_ragged_samples():
    assert mismatch([[-1.0, -2.0], [], [-3.0]], [[-1.5, -2.0], [], [-2.0]]) == pytest.approx(0.5)


def test_mismatch_of_padded_tensors_counts_masked_tokens_only():
    engine = torch.tensor([[-1.0, -2.0], [-3.0, math.nan]])
    learner = torch.tensor([[-1.5, -2.0], [-2.0, 99.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert mismatch(engine, learner, mask) == pytest.approx(0.5)


def test_a_mismatch_above_the_limit_or_not_a_number_says_that_the_engine_is_stale():
    assert_fresh(0.009, limit=0.01, version=4)
    for bad in (0.02, math.nan):
        with pytest.raises(StaleEngine, match=r"engine 0 says that it holds weight version 4.*stale or wrong"):
            assert_fresh(bad, limit=0.01, version=4, engine="engine 0")


def test_an_update_of_half_precision_is_half_the_size():
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        update = pack([("w", torch.zeros(64, 100, dtype=dtype))], version=1)
        sizes[dtype] = sum(bucket.nbytes for bucket in update.buckets)
    assert sizes == {torch.float32: 25_600, torch.bfloat16: 12_800}
