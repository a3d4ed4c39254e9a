"""A model's weights as an iterable of named tensors, as vLLM's senders expect it."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metaalign_rl.weights.checksum import Digest


class TensorMeta(NamedTuple):
    """Name, dtype and shape of a tensor, like vLLM's `ParamMeta`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightStream:
    """Like vLLM's `WeightSource`, without importing vLLM.

    Args:
        passes: returns a new iterator over the named tensors. If weights are sharded, iterating is a collective
            operation: every rank must iterate to the end.
        checked: whether this rank computes checksums.
    """

    def __init__(self, passes: Callable[[], Iterator[tuple[str, Tensor]]], checked: bool = True) -> None:
        self._passes, self._checked = passes, checked
        self._metadata: list[TensorMeta] = []
        self._digest = Digest()

    def metadata(self) -> list[TensorMeta]:
        """The tensors' metadata, in order. The first call iterates once, because a checkpoint's names may differ."""
        if not self._metadata:
            self._metadata = [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._passes()]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._digest = Digest()
        return self._digest.watch(self._passes()) if self._checked else self._passes()

    def exhaust(self) -> None:
        """Iterate to the end, so that the other ranks can."""
        deque(self, maxlen=0)

    @property
    def checksum(self) -> str:
        """Checksum of the tensors of the last iteration."""
        return self._digest.hexdigest()
