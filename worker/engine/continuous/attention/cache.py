"""The keys and values of all rows and layers: one block of memory, allocated once and written in place.

Owns the tensors and the layout of a slot in them. `slots` cuts the slots, and `attention` reads and writes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from batchmill.worker.engine.continuous.scheduling.slots import Slot
from batchmill.worker.engine.continuous.scheduling.step import Copy


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The keys and values that a model keeps of a token, and how its layers attend to them."""

    layers: int
    #: Heads of keys and values in each layer.
    heads: int
    #: Numbers of one head's key.
    key_size: int
    #: Numbers of one head's value.
    value_size: int
    dtype: torch.dtype
    #: True where the scores go through a soft cap.
    capped: bool = False
    #: Heads of queries in each layer; 0 where that is not known.
    query_heads: int = 0
    #: The windows of its layers that do not see all tokens before them.
    windows: tuple[int, ...] = ()

    @property
    def token_bytes(self) -> int:
        return self.layers * self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


class Cache:
    """The tensors `keys` and `values`: (layers, tokens * heads, size). Every place reads as zeros until it is written.

    `heads_first`: a slot holds one head's tokens after the other's, (heads, tokens, size), so that the heads of
    neighbouring slots are one batch of matrices. Else it holds (tokens, heads, size), as FlashAttention reads it.
    """

    def __init__(self, shape: CacheShape, tokens: int, device: torch.device, *, heads_first: bool) -> None:
        self.heads = shape.heads
        self._heads_first = heads_first
        places = tokens * shape.heads
        self.keys = _zeros((shape.layers, places, shape.key_size), shape.dtype, device)
        self.values = _zeros((shape.layers, places, shape.value_size), shape.dtype, device)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy(self, copies: Iterable[Copy]) -> None:
        """Copies tokens of all layers, and zeros behind them, one copy after the other; none overlaps itself."""
        for target, source, tokens in copies:
            for each in (self.keys, self.values):
                if source is not None:
                    self._slot(each, target)[:, :, :tokens] = self._slot(each, source)[:, :, :tokens]
                self._slot(each, target)[:, :, tokens:].zero_()

    def _slot(self, memory: torch.Tensor, slot: Slot) -> torch.Tensor:
        """(layers, heads, tokens of the slot, size), a view."""
        held = memory[:, slot.start * self.heads : slot.end * self.heads]
        layers, _, size = held.shape
        if self._heads_first:
            return held.view(layers, self.heads, slot.size, size)
        return held.view(layers, slot.size, self.heads, size).transpose(1, 2)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Makes zeros; on a CPU their memory is taken when it is first written, as numpy's is and torch's is not."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    count = int(np.prod(size)) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(size)
