"""Projections that read the same tensor (q/k/v, gate/up): found by watching a model run, then computed once for all.

Owns the groups of layers that share an input, and the calls of a group within a step. The first layer that is called
computes the product of all, the others take their part of it; nothing outlives the tensor that they read. This module
knows no model's name and no arithmetic.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchmill.worker.engine.continuous.weights.fused_matmul import FusedMatmul


def find_shared_inputs(model: nn.Module, run: Callable[[], object]) -> list[tuple[nn.Linear, ...]]:
    """Groups the linear layers that `run` calls: those of one parent that read one tensor, each layer exactly once.

    A layer that is called more often in one run stands alone.
    """
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    inputs: dict[nn.Linear, list[Tensor]] = defaultdict(list)

    def watch(layer: nn.Linear, arguments: tuple[Any, ...]) -> None:
        # The tensors are kept until the run is over, so that no two have the same id.
        if arguments:
            inputs[layer].append(arguments[0])

    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                stack.callback(layer.register_forward_pre_hook(watch).remove)
        run()
    groups: dict[tuple[int, int], list[nn.Linear]] = defaultdict(list)
    for layer, read in inputs.items():
        key = (id(parents[layer]), id(read[0])) if len(read) == 1 else (id(layer), 0)
        groups[key].append(layer)
    return [tuple(group) for group in groups.values()]


class FusedProjections:
    """Layers whose outputs come from one product: `join` puts it in place of their forward, `part` takes it out.

    One thread at a time. The layers stay where they are, with weights that others may look at.
    """

    def __init__(self, layers: Sequence[nn.Linear], product: FusedMatmul) -> None:
        self._layers = layers
        self._product = product
        self._parts: dict[int, Tensor] = {}
        self._read: weakref.ref[Tensor] | None = None

    def join(self) -> None:
        """Lets the product compute in place of the layers."""
        for place, layer in enumerate(self._layers):
            alone = len(self._layers) == 1
            vars(layer)["forward"] = self._product if alone else partial(self._take, place)

    def part(self) -> None:
        """Lets the layers compute for themselves again."""
        for layer in self._layers:
            del vars(layer)["forward"]

    def _take(self, place: int, x: Tensor) -> Tensor:
        """One layer's output for x: [..., inputs] -> [..., its width], a view."""
        if self._read is None or self._read() is not x or place not in self._parts:
            self._parts = dict(enumerate(torch.split(self._product(x), list(self._product.widths), -1)))
            # An error between two layers ends the step: the parts that are left go with the tensor that they read.
            self._read = weakref.ref(x, self._forget)
        taken = self._parts.pop(place)
        if not self._parts:
            self._read = None
        return taken

    def _forget(self, read: weakref.ref[Tensor]) -> None:
        if read is self._read:
            self._read = None
            self._parts = {}
