"""Weights on their way from the learner to the rollout engines: versioned, checksummed, confirmed.

A `WeightUpdate` is a few flat byte arrays with a table of what lies where. `ray.put` stores such arrays once,
and every engine of a machine reads them in place from shared memory. An engine answers an update with its
version and the checksum of the tensors that its loader took (`confirm`). What a checksum cannot show, whether
the loader did its work, the log-probabilities can (`mismatch`, `assert_fresh`).
"""

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

BUCKET_BYTES = 256 * 2**20
ALIGNMENT = 64  # bytes; a view of any dtype needs an aligned start

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class StaleEngine(RuntimeError):
    """A rollout engine does not hold the weights that it should."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: bytes `offset` and on of bucket `bucket`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bucket: int
    offset: int


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """A model's weights, packed.

    Attributes:
        version: the learner's count of updates; a fresh engine holds 0.
        checksum: of the packed tensors, by `Digest`.
        entries: the tensors, in the learner's order.
        buckets: one-dimensional uint8 arrays.
    """

    version: int
    checksum: str
    entries: tuple[Entry, ...]
    buckets: tuple[np.ndarray, ...]


class Digest:
    """A checksum that grows by one tensor at a time; neither order nor bucketing matters to the result.

    BLAKE2b over names, dtypes, shapes and raw bytes: 32 hexadecimal digits, about 1 s a GB.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in a tensor's name, dtype, shape and raw bytes."""
        header = repr((name, _dtype_name(tensor.dtype), tuple(tensor.shape))).encode()
        part = hashlib.blake2b(header, digest_size=16)
        part.update(_raw_bytes(tensor).data)
        self._parts.append(part.digest())

    def watch(self, tensors: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass `tensors` on and take in each one, so that the result covers what was consumed and no more."""
        for name, tensor in tensors:
            self.add(name, tensor)
            yield name, tensor

    def hexdigest(self) -> str:
        """The checksum of everything taken in so far."""
        return hashlib.blake2b(b"".join(sorted(self._parts)), digest_size=16).hexdigest()


def pack(tensors: NamedTensors, version: int, bucket_bytes: int = BUCKET_BYTES) -> WeightUpdate:
    """Copy `tensors` (on any device; an iterator may free each one after it) into buckets.

    A bucket holds up to `bucket_bytes`; a larger tensor has one to itself.
    """
    digest, entries = Digest(), []
    buckets: list[np.ndarray] = []
    used = capacity = 0
    for name, tensor in digest.watch(tensors):
        raw = _raw_bytes(tensor)
        if not buckets or used + raw.size > capacity:
            if buckets:
                buckets[-1] = buckets[-1][:used]
            used, capacity = 0, max(bucket_bytes, raw.size)
            buckets.append(np.zeros(capacity, dtype=np.uint8))  # lazily: untouched pages cost nothing
        buckets[-1][used : used + raw.size] = raw
        entries.append(Entry(name, _dtype_name(tensor.dtype), tuple(tensor.shape), len(buckets) - 1, used))
        used += math.ceil(raw.size / ALIGNMENT) * ALIGNMENT
    if buckets:
        buckets[-1] = buckets[-1][:used]
    return WeightUpdate(version, digest.hexdigest(), tuple(entries), tuple(buckets))


def unpack(update: WeightUpdate) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an update, in order, as views of its buckets: to be read, never written."""
    for entry in update.entries:
        dtype = getattr(torch, entry.dtype)
        size = math.prod(entry.shape) * dtype.itemsize
        raw = update.buckets[entry.bucket][entry.offset : entry.offset + size]
        with warnings.catch_warnings():
            # Arrays in Ray's shared memory are read-only, which torch cannot express and warns of.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(raw)
        yield entry.name, flat.view(dtype).view(entry.shape)


def confirm(update: WeightUpdate, version: int, checksum: str, *, engine: str = "the engine") -> None:
    """Check an engine's answer to `update`.

    Raises:
        StaleEngine: names the engine, and the version or checksum that was expected and found.
    """
    for what, expected, found in (
        ("version", update.version, version),
        ("checksum", update.checksum, checksum),
    ):
        if found != expected:
            raise StaleEngine(
                f"{engine} did not take weight update {update.version}: expected {what} {expected}, found {found}"
            )


def mismatch(
    engine: torch.Tensor | Sequence[Sequence[float]],
    learner: torch.Tensor | Sequence[Sequence[float]],
    mask: torch.Tensor | None = None,
) -> float:
    """Mean |engine - learner| a token, in nats, of the two sides' log-probabilities of the same tokens.

    Either ragged lists, one a sample, or tensors of one shape with a `mask` of that shape, true at response
    tokens. NaN on either side gives NaN.
    """
    if mask is None:
        assert len(engine) == len(learner), f"{len(engine)} samples against {len(learner)}"
        engine = torch.cat([torch.as_tensor(sample, dtype=torch.float64) for sample in engine])
        learner = torch.cat([torch.as_tensor(sample, dtype=torch.float64) for sample in learner])
    else:
        engine, learner = torch.as_tensor(engine)[mask.bool()], torch.as_tensor(learner)[mask.bool()]
    assert engine.shape == learner.shape, f"{engine.numel()} tokens against {learner.numel()}"
    assert engine.numel() > 0, "no tokens to compare"
    return (engine.double() - learner.double()).abs().mean().item()


def assert_fresh(mismatch: float, limit: float, version: int, engine: str = "the engine") -> None:
    """Check a measured `mismatch`, in nats a token, of samples that claim weight version `version`.

    Raises:
        StaleEngine: it is above `limit`, or NaN.
    """
    if not mismatch <= limit:  # so that NaN fails too
        raise StaleEngine(
            f"{engine} says that it holds weight version {version}, but its log-probabilities differ from "
            f"the learner's by {mismatch:.4g} nats a token (limit {limit:.4g}): they are stale or wrong"
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's elements in C order as flat uint8; a view where the tensor lies so in main memory."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def send_weights(update, engines):
    """Interim."""
    import ray

    from metaalign_rl.actors import Gone, get
    from metaalign_rl.faults import EngineLost

    answers = {number: engine.load_weights.remote(update) for number, engine in engines.items()}
    sent = ray.get(update)
    for number, answer in answers.items():
        try:
            confirm(sent, *get(answer), engine=f"rollout engine {number}")
        except Gone as error:
            raise EngineLost(number, error) from error


def send_checkpoint(checkpoint, engines):
    """Interim."""
    import ray
    from safetensors.torch import load_file

    tensors = {name: t for file in sorted(checkpoint.glob("*.safetensors")) for name, t in load_file(file).items()}
    version = max(ray.get([engine.ready.remote() for engine in engines.values()])) + 1
    send_weights(ray.put(pack(tensors.items(), version)), engines)
