"""The trial of an attention backend on its device: one layer of random rows, compared with attention by definition.

Rows are read in pieces, decoded, and mixed in one step; one is longer than a page; windows hide its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from batchmill.worker.engine.continuous.attention.backends import StepAttention, StepBounds
from batchmill.worker.engine.continuous.attention.cache import CacheShape
from batchmill.worker.engine.continuous.scheduling.slots import Slots
from batchmill.worker.engine.continuous.scheduling.step import Piece, Row

#: Tokens of the long row at the most: more than two pages.
_LONG_TOKENS, _SHORT_TOKENS = 600, 8
#: The soft cap of a model that has one is tried at this value.
_SOFTCAP = 20.0
_SEED = 1
#: The largest error, as a part of the largest number: in 16 bits keys, shares and results are rounded.
_TOLERANCE, _ROUGH_TOLERANCE = 1e-4, 3e-2


def error_of(
    attention: StepAttention, shape: CacheShape, slots: Slots, bounds: StepBounds, device: torch.device
) -> str | None:
    """Says how far its results are from the right ones; None where they agree. It leaves the slots as they were."""
    for window in (None, *sorted({min(each, bounds.longest // 2) for each in shape.windows} - {0})):
        far = _RandomRows(shape, slots, bounds, device, window).error(attention)
        if not far <= (_TOLERANCE if shape.dtype.itemsize >= torch.float32.itemsize else _ROUGH_TOLERANCE):
            return f"its results are wrong by {far:.1%}" + ("" if window is None else f" in a window of {window}")
    return None


class _RandomRows:
    """Two rows of random queries, keys and values, computed in several steps."""

    def __init__(
        self, shape: CacheShape, slots: Slots, bounds: StepBounds, device: torch.device, window: int | None
    ) -> None:
        self._options: dict[str, Any] = {
            "scaling": shape.key_size**-0.5,
            "sliding_window": window,
            "softcap": _SOFTCAP if shape.capped else None,
        }
        self._slots = slots
        self._tokens = bounds.tokens
        generator = torch.Generator().manual_seed(_SEED)
        lengths = [min(_LONG_TOKENS, bounds.longest), min(_SHORT_TOKENS, bounds.longest)][: bounds.rows]
        self._rows = [_RandomRow(shape, length, generator, device) for length in lengths]

    def error(self, attention: StepAttention) -> float:
        """The largest error of all steps, as a part of the largest number of the right results."""
        held = []
        try:
            for each in self._rows:
                each.row.slot = self._slots.take(each.length)
                if each.row.slot is not None:
                    held.append(each)
            return max((self._step(attention, held, spans) for spans in self._steps(held)), default=0.0)
        finally:
            for each in held:
                self._slots.give(each.row.held)

    def _steps(self, held: Sequence[_RandomRow]) -> list[list[tuple[int, int]]]:
        """The spans of each row in each step: beginnings, a piece beside a row that decodes, and rows that decode."""
        long = held[0].length if held else 0
        first = max(1, min(long // 2, self._tokens - _SHORT_TOKENS))
        second = max(first, min(long - 1, first + self._tokens - 1))
        steps = [[(0, first)], [(first, second)], [(second, min(second + 1, long))]]
        if len(held) > 1:
            ends = [max(0, held[1].length - left) for left in (2, 1, 0)]
            for spans, span in zip(steps, pairwise([0, *ends]), strict=True):
                spans.append(span)
        return steps

    def _step(self, attention: StepAttention, held: Sequence[_RandomRow], spans: Sequence[tuple[int, int]]) -> float:
        at_work = [(each, *span) for each, span in zip(held, spans, strict=True) if span[0] < span[1]]
        if not at_work:
            return 0.0
        attention.plan([Piece(each.row, begin, end) for each, begin, end in at_work])
        parts = [[each.numbers[place][:, begin:end] for each, begin, end in at_work] for place in range(3)]
        query, key, value = (torch.cat(each, dim=1)[None] for each in parts)
        found, _ = attention(SimpleNamespace(layer_idx=0), query, key, value, None, **self._options)  # type: ignore[arg-type]
        wanted = torch.cat([each.by_definition(begin, end, self._options) for each, begin, end in at_work])
        return float((found[0].float() - wanted).abs().max() / wanted.abs().max())


class _RandomRow:
    """One row with its queries, keys and values, each (heads, tokens, size)."""

    def __init__(self, shape: CacheShape, length: int, generator: torch.Generator, device: torch.device) -> None:
        self.length = length
        self.row = Row([0] * length, length, share=False)
        heads, keys, values = shape.query_heads or shape.heads, shape.key_size, shape.value_size
        sizes = ((heads, length, keys), (shape.heads, length, keys), (shape.heads, length, values))
        self.numbers = [torch.randn(size, generator=generator).to(device=device, dtype=shape.dtype) for size in sizes]

    def by_definition(self, begin: int, end: int, options: dict[str, Any]) -> torch.Tensor:
        """Attention of these queries in float32: (tokens, heads, size of a value)."""
        query, key, value = (each.float() for each in self.numbers)
        shared = query.shape[0] // key.shape[0]
        keys, values = (each[:, :end].repeat_interleave(shared, 0) for each in (key, value))
        scores = query[:, begin:end] @ keys.transpose(1, 2) * options["scaling"]
        if options["softcap"] is not None:
            scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
        asks = torch.arange(begin, end, device=scores.device)[:, None]
        places = torch.arange(end, device=scores.device)
        hidden = places > asks
        if options["sliding_window"] is not None:
            hidden |= places <= asks - options["sliding_window"]
        output: torch.Tensor = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
        return output.transpose(0, 1)
