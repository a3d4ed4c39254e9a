"""Pack tensors into flat byte arrays of bounded size, which Ray's object store shares without a copy."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; a view of any dtype needs an aligned start


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a bucket; its bytes begin at `offset`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some of a model's tensors in one uint8 array, in the learner's order."""

    entries: list[Entry]
    data: np.ndarray


def fill(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Copy `tensors` into buckets, one bucket at a time.

    Args:
        tensors: on any device. An iterator may free a tensor when the next one is asked for.
        bucket_bytes: size of a bucket; a larger tensor gets a bucket of its own.
    """
    entries: list[Entry] = []
    data = np.zeros(bucket_bytes, dtype=np.uint8)  # pages that are not written cost no memory
    used = 0
    for name, tensor in tensors:
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        start = math.ceil(used / ALIGNMENT) * ALIGNMENT
        if start + raw.size > data.size:
            if entries:
                yield Bucket(entries, data[:used])
            entries, start = [], 0
            data = np.zeros(max(bucket_bytes, raw.size), dtype=np.uint8)
        used = start + raw.size
        data[start:used] = raw
        entries.append(Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start))
    if entries:
        yield Bucket(entries, data[:used])


def unpack(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket, in order, as views of its array. Read them only: the memory is shared."""
    with warnings.catch_warnings():
        # Arrays in Ray's shared memory are read-only; torch has no such tensors and warns.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        data = torch.from_numpy(bucket.data)
    for entry in bucket.entries:
        dtype = getattr(torch, entry.dtype)
        size = math.prod(entry.shape) * dtype.itemsize
        yield entry.name, data[entry.offset : entry.offset + size].view(dtype).view(entry.shape)
