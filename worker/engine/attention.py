"""Attention over the cache, for any transformers model: the function that each of its layers calls.

Owns what is read and written of the cache in a step. It knows no schedule but the pieces that it is given.

Pieces whose slots are neighbours form a group, and each layer reads a group's keys and values as one view of the
cache: nothing is gathered, and heads that share keys are folded into the queries instead of repeating the keys. A
group's mask is made once for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.engine.cache import Cache
from worker.engine.schedule import Piece

#: Longer pieces are grouped while padding takes at most this many times what they need.
PADDING = 1.5
#: Above this many scores of a head, queries of heads that share keys are computed one after the other.
FOLDED_SCORES = 2**18


class Attention:
    """`plan` a step, run the model's forward, in which every layer calls this."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        #: Spent in this function so far, by the CPU's clock.
        self.seconds = 0.0
        self._groups: list[_Group] = []
        self._places = torch.empty(0, dtype=torch.long)

    def plan(self, pieces: Sequence[Piece[Any]]) -> None:
        """Takes the pieces of a step, in the order of their tokens in the forward."""
        places: list[int] = []
        for row, begin, end in pieces:
            places.extend(range(row.held.start + begin, row.held.start + end))
        self._places = torch.tensor(places)
        self._groups = list(_groups(pieces))

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Takes queries (1, heads, tokens, size), and keys and values of the same tokens, which it keeps.

        Returns (1, tokens, heads, size of a value), as transformers' attention functions do.
        """
        begin = perf_counter()
        try:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            layer = int(module.layer_idx)
            return self._answer(layer, query, key, value, scale, sliding_window, softcap)[None], None
        finally:
            self.seconds += perf_counter() - begin

    def _answer(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_copy_(0, self._places, key[0].transpose(0, 1))
        values.index_copy_(0, self._places, value[0].transpose(0, 1))
        queries = query[0].transpose(0, 1)
        if len(self._groups) == 1 and self._groups[0].longest == 1:
            return self._groups[0].decode(queries, keys, values, scaling, window, softcap)
        found = queries.new_empty((*queries.shape[:2], values.shape[-1]))
        for group in self._groups:
            attend = group.decode if group.longest == 1 else group.prefill
            found[group.tokens] = attend(queries[group.tokens], keys, values, scaling, window, softcap)
        return found


class _Group:
    """Pieces of neighbouring slots of one size; `first` is the place of their first token in the forward.

    `longest`: the tokens of the longest piece. `reach`: the places of each slot that are read.
    """

    def __init__(self, pieces: Sequence[Piece[Any]], first: int) -> None:
        slot = pieces[0].row.held
        self.rows = len(pieces)
        self.counts = [end - begin for _, begin, end in pieces]
        self.tokens = slice(first, first + sum(self.counts))
        self.longest = max(self.counts)
        self.reach = max(piece.end for piece in pieces)
        self._size = slot.size
        self._slots = slice(slot.start, slot.start + self.rows * slot.size)
        self._begins = [piece.begin for piece in pieces]
        self._masks: dict[int | None, torch.Tensor] = {}

    def decode(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """One token a row: (rows, heads, size) -> (rows, heads, size of a value)."""
        folded = queries.unflatten(1, (keys.shape[1], -1))
        mask = self._mask(window, queries.dtype)
        found = _attend(folded, self._view(keys), self._view(values), mask, scaling, softcap)
        return found.flatten(1, 2)

    def prefill(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Several tokens a row, packed: (tokens, heads, size) -> (tokens, heads, size of a value)."""
        padded = self._padded(queries).unflatten(2, (keys.shape[1], -1))
        mask = self._mask(window, queries.dtype)
        read_keys, read_values = self._view(keys), self._view(values)
        rows, longest, heads, shared, _ = padded.shape
        at_once = shared if longest * self.reach * shared <= FOLDED_SCORES else 1
        found = queries.new_empty((rows, longest, heads, shared, values.shape[-1]))
        for begin in range(0, shared, at_once):
            part = padded[:, :, :, begin : begin + at_once].permute(0, 2, 3, 1, 4).flatten(2, 3)
            answer = _attend(part, read_keys, read_values, mask.repeat(1, 1, at_once, 1), scaling, softcap)
            found[:, :, :, begin : begin + at_once] = answer.unflatten(2, (at_once, longest)).permute(0, 3, 1, 2, 4)
        return self._packed(found.flatten(2, 3))

    def _view(self, cached: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, size) of the cache -> (rows, heads, reach, size), without a copy."""
        slots = cached[self._slots].unflatten(0, (self.rows, self._size))
        return slots[:, : self.reach].transpose(1, 2)

    def _padded(self, packed: torch.Tensor) -> torch.Tensor:
        if self.rows == 1:
            return packed[None]
        return torch.nn.utils.rnn.pad_sequence(list(packed.split(self.counts)), batch_first=True)

    def _packed(self, padded: torch.Tensor) -> torch.Tensor:
        if self.rows == 1:
            return padded[0]
        return torch.cat([row[:count] for row, count in zip(padded, self.counts, strict=True)])

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """(rows, 1, longest, reach): what is added to the scores. A query sees itself and what is before it."""
        mask = self._masks.get(window)
        if mask is None:
            queries = torch.tensor(self._begins)[:, None] + torch.arange(self.longest)
            keys = torch.arange(self.reach)
            hidden = keys > queries[:, :, None]
            if window is not None:
                hidden |= keys <= queries[:, :, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None]
            self._masks[window] = mask
        return mask


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
    scores = torch.matmul(queries, keys.transpose(2, 3)).mul_(scaling / softcap).tanh_().mul_(softcap).add_(mask)
    return torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype), values)


def _groups(pieces: Sequence[Piece[Any]]) -> Iterator[_Group]:
    """Pieces that are read together, in their order."""
    first = 0
    together: list[Piece[Any]] = []
    for piece in pieces:
        if together and not _joins(piece, together):
            group = _Group(together, first)
            yield group
            first, together = group.tokens.stop, []
        together.append(piece)
    yield _Group(together, first)


def _joins(piece: Piece[Any], group: Sequence[Piece[Any]]) -> bool:
    before = group[-1]
    slot, neighbour = piece.row.held, before.row.held
    if slot.size != neighbour.size or slot.start != neighbour.end:
        return False
    single, singles = piece.end - piece.begin == 1, before.end - before.begin == 1
    if single or singles:
        return single and singles
    all_pieces = [*group, piece]
    longest = max(each.end - each.begin for each in all_pieces)
    reach = max(each.end for each in all_pieces)
    needed = sum((each.end - each.begin) * each.end for each in all_pieces)
    return len(all_pieces) * longest * reach <= PADDING * needed
