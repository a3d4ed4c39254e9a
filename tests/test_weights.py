"""Weights in buckets, their checksums, and the errors of stale engines."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metaalign_rl.weights import StaleEngine, assert_fresh, confirm
from metaalign_rl.weights.buckets import Bucket, fill, unpack
from metaalign_rl.weights.checksum import CHUNK, Digest

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


def checksum(tensors: object) -> str:
    digest = Digest()
    for name, tensor in tensors:
        digest.add(name, tensor)
    return digest.hexdigest()


@settings(max_examples=200, deadline=None)
@given(tensors=named_tensors(), bucket_bytes=st.integers(1, 300))
def test_unpacking_returns_the_packed_tensors_for_any_bucket_size(tensors, bucket_bytes):
    buckets = list(fill(iter(tensors), bucket_bytes))
    unpacked = [pair for bucket in buckets for pair in unpack(bucket)]

    assert [name for name, _ in unpacked] == [name for name, _ in tensors]
    for (_, found), (_, original) in zip(unpacked, tensors, strict=True):
        assert found.dtype == original.dtype
        assert found.shape == original.shape
        assert bits(found) == bits(original)
    assert checksum(unpacked) == checksum(tensors) == checksum(reversed(tensors))
    for bucket in buckets:
        filled = [entry for entry in bucket.entries if math.prod(entry.shape) > 0]
        assert bucket.data.size <= bucket_bytes or len(filled) == 1


def test_a_packed_tensor_is_a_copy():
    weight = torch.zeros(3)
    (bucket,) = fill([("w", weight)], 100)
    weight += 1
    assert dict(unpack(bucket))["w"].tolist() == [0, 0, 0]


def test_a_tensor_is_packed_before_the_next_one_is_requested():
    """Under ZeRO-3 it is gone then."""

    def passing():
        for name in "ab":
            weight = torch.ones(3)
            yield name, weight
            weight.zero_()

    assert [t.tolist() for bucket in fill(passing(), 64) for _, t in unpack(bucket)] == [[1, 1, 1]] * 2


def test_read_only_buckets_are_read_in_place_without_a_warning(recwarn):
    (bucket,) = fill([("w", torch.arange(4.0))], 100)
    bucket.data.flags.writeable = False
    tensor = dict(unpack(Bucket(bucket.entries, bucket.data)))["w"]
    assert tensor.data_ptr() == bucket.data.ctypes.data
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
def test_the_checksum_detects_every_difference(other):
    assert checksum(other) != checksum(BASE)


def test_the_checksum_detects_a_changed_bit_and_a_moved_value_in_a_large_tensor():
    large = torch.zeros(3 * CHUNK // 4 + 5)
    found = {checksum([("w", large)])}
    for places in ([0], [1], [CHUNK // 4], [len(large) - 1], [0, 1], [CHUNK // 4, CHUNK // 2]):
        changed = large.clone()
        changed[places] = -0.0  # the sign bit alone
        found.add(checksum([("w", changed)]))
    assert len(found) == 7


def test_the_checksum_does_not_depend_on_memory_alignment():
    halves = torch.arange(7, dtype=torch.float16)
    assert checksum([("w", halves[1:])]) == checksum([("w", halves[1:].clone())])


def test_a_wrong_version_or_checksum_is_an_error_with_engine_expected_and_found():
    confirm((3, "ab"), (3, "ab"))
    with pytest.raises(StaleEngine, match="engine 1 did not apply weight update 3: expected version 3, found 2"):
        confirm((3, "ab"), (2, "ab"), engine="engine 1")
    with pytest.raises(StaleEngine, match="expected checksum ab, found 00"):
        confirm((3, "ab"), (3, "00"), engine="engine 1")


def test_a_mismatch_that_is_nan_or_above_the_limit_is_an_error():
    assert_fresh(0.009, limit=0.01, version=4)
    for bad in (0.02, math.nan):
        with pytest.raises(StaleEngine, match=r"engine 0 reports weight version 4.*stale or wrong"):
            assert_fresh(bad, limit=0.01, version=4, engine="engine 0")


def test_half_precision_weights_take_half_the_bytes():
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        (bucket,) = fill([("w", torch.zeros(64, 100, dtype=dtype))], 30_000)
        sizes[dtype] = bucket.data.size
    assert sizes == {torch.float32: 25_600, torch.bfloat16: 12_800}
