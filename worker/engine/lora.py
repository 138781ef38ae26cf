"""LoRA adapters in a forward: the assignment of tokens to adapters, and the products that the adapted layers add.

Owns the adapters' numbers, and the hooks that add their products to the outputs. While no token of a forward uses an
adapter there are no hooks, so that the model runs as if it had no adapters. It knows no request's text, no cache and
no file.

A layer's low-rank product is added behind whatever computes the layer itself: quantized weights, fused projections, or
an offloaded layer, which all stay as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from batchmill.jobs.requests.request import ErrorCode
from batchmill.worker.engine import not_held
from batchmill.worker.engine.refused import Refused
from batchmill.worker.models.adapters.low_rank import LoadedAdapter, LowRank

#: The number of the model without an adapter.
BASE = 0
#: Layers whose own output is not rounded before a product is added to it, as in peft.
_PLAIN = (nn.Linear, nn.Embedding, Conv1D)


class OtherTokens(RuntimeError):
    """The error of a layer that sees other tokens than those of the step, which belong to no known adapter."""


@dataclass(frozen=True, slots=True)
class SeenTokens:
    """The tokens that a layer sees."""

    #: Their number; None for any number.
    tokens: int | None
    #: The places of each adapter's tokens among them, (tokens,) on the device; None where all are the adapter's.
    places: Mapping[int, Tensor | None]


@dataclass(frozen=True, slots=True)
class Assignment:
    """The adapters of one forward's tokens: in the layers, and in the head, which may see only some of them."""

    layers: SeenTokens
    head: SeenTokens


class Lora:
    """The adapters of one model.

    `fixed`: a product is computed for all tokens of a forward, so that its shape does not depend on the other rows.
    """

    def __init__(
        self, model: PreTrainedModel, adapters: Sequence[LoadedAdapter], *, device: torch.device, fixed: bool = False
    ) -> None:
        self.numbers = {each.adapter.name: number for number, each in enumerate(adapters, BASE + 1)}
        self._device = device
        self._fixed = fixed
        self._head = model.get_output_embeddings()
        self._parts: defaultdict[nn.Module, dict[int, LowRank]] = defaultdict(dict)
        for number, adapter in enumerate(adapters, BASE + 1):
            for name, part in adapter.layers.items():
                self._parts[model.get_submodule(name)][number] = part
        self._hooks: list[RemovableHandle] = []
        self._assignment: Assignment | None = None

    def number(self, name: str | None) -> int:
        """Returns an adapter's number. Raises Refused for one that this worker does not hold."""
        if name is None:
            return BASE
        if name not in self.numbers:
            raise Refused(ErrorCode.UNSUPPORTED_BY_WORKER, not_held(name, self.numbers))
        return self.numbers[name]

    def assign_all(self, number: int) -> Assignment | None:
        """Gives all tokens to one adapter, however often and in which order the layers see them."""
        if number == BASE:
            return None
        seen = SeenTokens(None, {number: None})
        return Assignment(seen, seen)

    def assign(self, owners: Sequence[int], kept: Sequence[int] | None = None) -> Assignment | None:
        """Gives each token of a forward to its adapter, by number; `kept`: the places that the head sees, None for all.

        Returns None where no token has an adapter.
        """
        if not any(owners):
            return None
        layers = self._seen(owners)
        return Assignment(layers, layers if kept is None else self._seen([owners[place] for place in kept]))

    def _seen(self, owners: Sequence[int]) -> SeenTokens:
        places: defaultdict[int, list[int]] = defaultdict(list)
        for place, number in enumerate(owners):
            if number != BASE:
                places[number].append(place)
        return SeenTokens(
            len(owners),
            {
                number: None if len(own) == len(owners) else torch.tensor(own, device=self._device)
                for number, own in places.items()
            },
        )

    @contextmanager
    def applied(self, assignment: Assignment | None) -> Iterator[None]:
        """A context in which forwards compute with the adapters of this assignment, None for none."""
        if assignment is None:
            self._detach()
        elif not self._hooks:
            self._hooks = [layer.register_forward_hook(self._added) for layer in self._parts]
        self._assignment = assignment
        try:
            yield
        finally:
            self._assignment = None

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _added(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """Returns the layer's output plus the products of the assigned adapters."""
        if self._assignment is None:
            return output
        seen = self._assignment.head if layer is self._head else self._assignment.layers
        parts = self._parts[layer]
        inputs = arguments[0].flatten() if isinstance(layer, nn.Embedding) else arguments[0].flatten(0, -2)
        outputs = output.reshape(-1, output.shape[-1])
        if seen.tokens is not None and not len(inputs) == len(outputs) == seen.tokens:
            raise OtherTokens(f"sees {len(inputs)} tokens in a step of {seen.tokens} ({type(layer).__name__})")
        inputs = inputs.to(outputs.device)  # a layer may compute on another device than its inputs are on
        for number, places in seen.places.items():
            if number in parts:
                outputs = self._sum(outputs, inputs, parts[number], places, plain=type(layer) in _PLAIN)
        return outputs.view(output.shape)

    def _sum(self, outputs: Tensor, inputs: Tensor, part: LowRank, places: Tensor | None, *, plain: bool) -> Tensor:
        """Adds one adapter's product to outputs [tokens, outputs] at its places, in their own memory if it can."""
        if places is None:
            return _rounded(outputs, part.delta(inputs), plain=plain)
        places = places.to(outputs.device)
        if self._fixed:
            delta = part.delta(inputs).index_select(0, places)
        else:
            delta = part.delta(inputs.index_select(0, places))
        return outputs.index_copy_(0, places, _rounded(outputs.index_select(0, places), delta, plain=plain))


def _rounded(outputs: Tensor, delta: Tensor, *, plain: bool) -> Tensor:
    """Their sum in the layer's dtype: rounded once for layers that are not quantized, as in peft, else before too."""
    delta = delta.to(outputs.device)
    return (outputs + delta).to(outputs.dtype) if plain else outputs + delta.to(outputs.dtype)
