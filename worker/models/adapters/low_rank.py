"""What an adapter is once it is loaded: for each layer that it changes, two small matrices and a scale.

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
    """What one adapter adds to one layer. All tensors are float32, whatever the model computes in, as in peft.

    `down`: (rank, inputs), `up`: (outputs, rank), `bias`: (outputs,) or None. For an embedding, whose inputs are token
    ids, `embeds` is true and `down` holds a column a token.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    scale: float
    embeds: bool = False

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.down, self.up, self.bias) if each is not None)

    def delta(self, inputs: Tensor) -> Tensor:
        """What is added to the layer's outputs: [tokens, inputs] (for an embedding [tokens]) -> [tokens, outputs]."""
        if self.embeds:
            return functional.linear(functional.embedding(inputs, self.down.t()), self.up) * self.scale
        narrow = functional.linear(inputs.to(self.down.device, self.down.dtype), self.down)
        return functional.linear(narrow, self.up, self.bias) * self.scale


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter on the model's devices. `layers`: what it adds, by the name of the module that it changes.

    `content`: what it was read from.
    """

    adapter: Adapter
    content: Content
    layers: Mapping[str, LowRank]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.layers.values())
