"""A checksum of named tensors that both ends of a transfer work out where their tensors lie, on any device."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 2**18  # bytes that one sum covers


class Digest:
    """A checksum that grows by one tensor at a time; neither order nor bucketing matters to the result.

    It covers names, dtypes, shapes and raw bytes. The bytes of a tensor are hashed on its own device, since fetching a
    model from a GPU would take longer than sending it: each chunk's 32-bit words w become Σ r·w modulo 2^64 with fixed
    random r (multilinear hashing, Carter and Wegman 1979: two contents agree with probability 2^-32 or less). BLAKE2b
    joins these sums: 32 hexadecimal digits.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._parts: list[tuple[bytes, Tensor]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in a tensor's name, dtype, shape and raw bytes."""
        self.names.add(name)
        self._parts.append((repr((name, str(tensor.dtype), tuple(tensor.shape))).encode(), _sums(tensor)))

    def watch(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass `tensors` on and take in each one, so that the result covers what was consumed and no more."""
        for name, tensor in tensors:
            self.add(name, tensor)
            yield name, tensor

    def hexdigest(self) -> str:
        """The checksum of everything taken in so far."""
        parts = [hashlib.blake2b(header + sums.cpu().numpy().tobytes()).digest() for header, sums in self._parts]
        return hashlib.blake2b(b"".join(sorted(parts)), digest_size=16).hexdigest()


@torch.no_grad()
def _sums(tensor: Tensor) -> Tensor:
    """Int64, one a chunk of the tensor's bytes in C order."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    at_once = CHUNK if raw.device.type == "cpu" else 256 * CHUNK  # a CPU's cache, or few launches on a GPU
    return torch.cat([_sums_of_block(block) for block in raw.split(at_once)])


def _sums_of_block(raw: Tensor) -> Tensor:
    width = max(4, min(CHUNK, math.ceil(raw.numel() / 4) * 4))
    # Padding by nothing copies too, which 32-bit words need: in a bucket a tensor may start anywhere.
    words = functional.pad(raw, (0, -raw.numel() % width)).view(torch.int32).view(-1, width // 4).to(torch.int64)
    factors = _factors(raw.device)[: width // 4]
    if raw.device.type == "cpu":
        return torch.stack([row @ factors for row in words]) if len(words) else words.sum(dim=1)
    return (words * factors).sum(dim=1)  # CUDA has no integer @


@cache
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (CHUNK // 4,), generator=generator, dtype=torch.int64).to(device)
