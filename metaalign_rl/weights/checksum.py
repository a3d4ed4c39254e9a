"""A checksum of named tensors. Sender and receiver compute it on the device that holds the tensors."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 2**18  # bytes covered by one sum


class Digest:
    """A checksum that is computed tensor by tensor. The order of tensors and the bucketing do not matter.

    It covers names, dtypes, shapes and raw bytes. Bytes are hashed on the tensor's own device, because copying a model
    from a GPU would take longer than sending it. The 32-bit words w of each chunk become Σ r·w modulo 2^64 with fixed
    random r (multilinear hashing, Carter and Wegman 1979; two contents collide with probability at most 2^-32).
    BLAKE2b joins the sums to 32 hexadecimal digits.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._parts: list[tuple[bytes, Tensor]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor: name, dtype, shape and raw bytes."""
        self.names.add(name)
        self._parts.append((repr((name, str(tensor.dtype), tuple(tensor.shape))).encode(), _sums(tensor)))

    def watch(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield `tensors` and add each one, so the result covers exactly what was consumed."""
        for name, tensor in tensors:
            self.add(name, tensor)
            yield name, tensor

    def hexdigest(self) -> str:
        """The checksum of all tensors added so far."""
        parts = [hashlib.blake2b(header + sums.cpu().numpy().tobytes()).digest() for header, sums in self._parts]
        return hashlib.blake2b(b"".join(sorted(parts)), digest_size=16).hexdigest()


@torch.no_grad()
def _sums(tensor: Tensor) -> Tensor:
    """Int64 sums, one per chunk of the tensor's bytes in C order."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    at_once = CHUNK if raw.device.type == "cpu" else 256 * CHUNK  # fits a CPU's cache; on a GPU, few kernel launches
    return torch.cat([_sums_of_block(block) for block in raw.split(at_once)])


def _sums_of_block(raw: Tensor) -> Tensor:
    width = max(4, min(CHUNK, math.ceil(raw.numel() / 4) * 4))
    # `pad` copies even if there is nothing to pad. The view as 32-bit words needs that: a tensor may start anywhere.
    words = functional.pad(raw, (0, -raw.numel() % width)).view(torch.int32).view(-1, width // 4).to(torch.int64)
    factors = _factors(raw.device)[: width // 4]
    if raw.device.type == "cpu":
        return torch.stack([row @ factors for row in words]) if len(words) else words.sum(dim=1)
    return (words * factors).sum(dim=1)  # CUDA has no integer matrix product


@cache
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (CHUNK // 4,), generator=generator, dtype=torch.int64).to(device)
