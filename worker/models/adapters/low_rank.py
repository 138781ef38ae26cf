"""A loaded adapter: for each layer that it changes, two small matrices and a scale.

Owns the product of one layer. It knows no model, no file and no batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.identity import Content


@dataclass(frozen=True, slots=True)
class LowRank:
    """One adapter's part of one layer. All tensors are float32, whatever the model computes in, as in peft."""

    #: (rank, inputs); for an embedding, a column a token.
    down: Tensor
    #: (outputs, rank).
    up: Tensor
    #: (outputs,) or None.
    bias: Tensor | None
    scale: float
    #: True for an embedding, whose inputs are token ids.
    embeds: bool = False

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.down, self.up, self.bias) if each is not None)

    def delta(self, inputs: Tensor) -> Tensor:
        """The product for a layer's outputs: [tokens, inputs] (for an embedding [tokens]) -> [tokens, outputs]."""
        if self.embeds:
            return functional.linear(functional.embedding(inputs, self.down.t()), self.up) * self.scale
        narrow = functional.linear(inputs.to(self.down.device, self.down.dtype), self.down)
        return functional.linear(narrow, self.up, self.bias) * self.scale


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter on the model's devices."""

    adapter: Adapter
    #: The files that it was read from.
    content: Content
    #: Its low-rank weights, by the name of the module that they change.
    layers: Mapping[str, LowRank]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.layers.values())
