"""A model's weights as vLLM's trainer engines take them."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metaalign_rl.weights.checksum import Digest


class TensorMeta(NamedTuple):
    """As vLLM's `ParamMeta`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightStream:
    """Does what vLLM's `WeightSource` does, without importing vLLM; `checksum` is of the last pass.

    Args:
        passes: gives a fresh pass over the named tensors. Where weights are sharded a pass is a collective operation:
            all ranks must go through it to its end.
        checked: whether this rank takes checksums.
    """

    def __init__(self, passes: Callable[[], Iterator[tuple[str, Tensor]]], checked: bool = True) -> None:
        self._passes, self._checked = passes, checked
        self._metadata: list[TensorMeta] = []
        self._digest = Digest()

    def metadata(self) -> list[TensorMeta]:
        """What a pass yields, in its order; the first call makes one to see, since a checkpoint's names may differ."""
        if not self._metadata:
            self._metadata = [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._passes()]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._digest = Digest()
        return self._digest.watch(self._passes()) if self._checked else self._passes()

    def exhaust(self) -> None:
        """Go through a pass for the other ranks' sake."""
        deque(self, maxlen=0)

    @property
    def checksum(self) -> str:
        """Of what the last pass yielded."""
        return self._digest.hexdigest()
