"""The keys and values of all rows and layers: one block of memory, allocated once and written in place.

Owns the tensors. Who has which places is `slots`' matter, what is read of them `attention`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from worker.engine.schedule import Copy


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a model keeps of a token: in each layer `heads` keys of `key_size` and values of `value_size`."""

    layers: int
    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return self.layers * self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


class Cache:
    """`keys` and `values`: (layers, tokens, heads, size). Every place reads as zeros until it is written."""

    def __init__(self, shape: CacheShape, tokens: int, device: torch.device) -> None:
        self.keys = _zeros((shape.layers, tokens, shape.heads, shape.key_size), shape.dtype, device)
        self.values = _zeros((shape.layers, tokens, shape.heads, shape.value_size), shape.dtype, device)

    def copy(self, copies: Iterable[Copy]) -> None:
        """Copies tokens of all layers, one copy after the other; none overlaps itself."""
        for source, target, tokens in copies:
            for each in (self.keys, self.values):
                each[:, target : target + tokens] = each[:, source : source + tokens]


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU of memory that is taken when it is first written, as numpy's zeros are and torch's are not."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    count = int(np.prod(size)) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(size)
