"""Attention over the cache by torch's own products, for any model on any device.

Owns the reads and writes of the cache in a step. It knows no schedule but the pieces that it is given.

Pieces whose slots are neighbours form a group, and each layer reads a group's keys and values as one view of the
cache: nothing is gathered, and keys that several heads share are never repeated. Pieces that begin a prompt need none
of the cache, and form groups by length. A group's mask is made once for all layers. Rows that decode are two batched
products, since the fused kernel takes longer for a single query, unless they are few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from batchmill.worker.devices.upload import upload
from batchmill.worker.engine.continuous.attention.cache import Cache
from batchmill.worker.engine.continuous.scheduling.step import Piece

#: Longer pieces are grouped while padding takes at most this many times what they need.
PADDING = 1.5
#: The cost of a kernel's call in itself, in products of a query and a key.
CALL = 4_096


class SdpaAttention:
    """The attention of one step at a time: `plan` it, then run the model's forward, in which every layer calls this.

    `fixed`: a row's numbers depend on its own length alone, and not on its neighbours'.
    """

    def __init__(self, cache: Cache, *, fixed: bool = False) -> None:
        self._cache = cache
        self._fixed = fixed
        #: Seconds spent in this function so far, by the CPU's clock.
        self.seconds = 0.0
        self._groups: list[_Group] = []
        self._places = torch.empty(0, dtype=torch.long)

    def plan(self, pieces: Sequence[Piece[Any]], *, unused: Sequence[int] = ()) -> None:
        """Groups the pieces of a step, as `StepAttention.plan` is told of them."""
        heads = self._cache.heads
        firsts = [row.held.start * heads + place for row, begin, end in pieces for place in range(begin, end)]
        sizes = [row.held.size for row, begin, end in pieces for _ in range(begin, end)]
        first = torch.tensor([*firsts, *(place * heads for place in unused)], device=self._cache.device)
        size = torch.tensor([*sizes, *(1 for _ in unused)], device=self._cache.device)
        # (heads, tokens): the place of each token's keys and values in a layer's memory.
        self._places = (first + torch.arange(heads, device=self._cache.device)[:, None] * size).flatten()
        self._tokens = len(first)
        self._groups = list(_groups(pieces, self._cache, fixed=self._fixed))

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
        """Computes a layer by its groups; shapes as in `StepAttention`."""
        begin = perf_counter()
        layer: Any = module.layer_idx
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_copy_(0, self._places, key.reshape(-1, key.shape[-1]))
        values.index_copy_(0, self._places, value.reshape(-1, value.shape[-1]))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        options = _Options(scale, sliding_window, softcap)
        own = _KeysValues(key[0].transpose(0, 1), value[0].transpose(0, 1))
        output = self._answer(query[0].transpose(0, 1), own, _KeysValues(keys, values), options)
        self.seconds += perf_counter() - begin
        return output[None], None

    def _answer(self, queries: torch.Tensor, own: _KeysValues, cached: _KeysValues, options: _Options) -> torch.Tensor:
        """(tokens, heads, size) -> (tokens, heads, size of a value)."""
        if self._groups[0].rows == self._tokens:
            return self._groups[0].decode(queries, cached, options)
        output = queries.new_zeros((*queries.shape[:2], cached.values.shape[-1]))
        for group in self._groups:
            if group.longest == 1:
                output[group.tokens] = group.decode(queries[group.tokens], cached, options)
            else:
                output[group.tokens] = group.prefill(queries, own, cached, options)
        return output


class _KeysValues(NamedTuple):
    """Keys and values to attend to: of a step's own tokens (tokens, heads, size), or a layer's memory."""

    keys: torch.Tensor
    values: torch.Tensor


class _Options(NamedTuple):
    """The options of a layer's attention."""

    scaling: float
    window: int | None
    softcap: float | None


class _Group:
    """Pieces that are computed together: the beginnings of rows, or rows whose slots are neighbours of one size.

    `tokens`: their tokens in the forward.
    `longest`: the tokens of the longest piece.
    `_reach`: the places of each slot that are read.
    """

    def __init__(self, pieces: Sequence[Piece[Any]], first: int, cache: Cache, *, fixed: bool) -> None:
        slot = pieces[0].row.held
        self.rows = len(pieces)
        self._counts = [end - begin for _, begin, end in pieces]
        self.tokens = slice(first, first + sum(self._counts))
        self.longest = max(self._counts)
        self._begins = [piece.begin for piece in pieces]
        self._heads, self._device = cache.heads, cache.device
        self._fresh = self.longest > 1 and _fresh(pieces[0], fixed=fixed)
        self._even = fixed
        self._fused = fixed or self.rows * self._heads * slot.size <= CALL
        whole = fixed or (self.longest == 1 and not self._fused and _copies_parts(cache))
        self._reach = slot.size if whole else max(piece.end for piece in pieces)
        self._size = slot.size
        self._memory = slice(slot.start * cache.heads, (slot.start + self.rows * slot.size) * cache.heads)
        self._masks: dict[int | None, torch.Tensor] = {}
        if self.longest > 1:
            self._padding, self._packing = self._places()

    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The token at each place of (rows, longest), and the place of each token among these."""
        counts = np.array(self._counts)[:, None]
        firsts = np.array(list(accumulate(self._counts, initial=self.tokens.start))[:-1])[:, None]
        places = np.arange(self.longest)
        padding = (firsts + np.minimum(places, counts - 1)).flatten()
        packing = np.flatnonzero(places < counts)
        return upload(padding, self._device), upload(packing, self._device)

    def decode(self, queries: torch.Tensor, cached: _KeysValues, options: _Options) -> torch.Tensor:
        """One token a row: (rows, heads, size) -> (rows, heads, size of a value)."""
        shared = queries.shape[1] // self._heads
        folded = queries.reshape(self.rows, self._heads, shared, -1)
        mask = self._mask(options.window, queries.dtype)
        keys, values = self._view(cached.keys), self._view(cached.values)
        if self._fused:
            if self._even:
                # A single query is multiplied by another kernel, whose rounding depends on where in memory it stands.
                folded = torch.cat([folded, folded[:, :, : shared % 2]], dim=2)
            output = _attend(folded, keys, values, mask, options)
            return output[:, :, :shared].reshape(self.rows, shared * self._heads, -1)
        flat_queries, flat_keys = folded.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)
        if options.softcap is None:
            scores = torch.baddbmm(mask.expand(-1, shared, -1), flat_queries, flat_keys, alpha=options.scaling)
        else:
            scores = _capped(torch.bmm(flat_queries, flat_keys), options.scaling, options.softcap).add_(mask)
        output = torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1))
        return output.view(self.rows, self._heads * shared, -1)

    def prefill(self, queries: torch.Tensor, own: _KeysValues, cached: _KeysValues, options: _Options) -> torch.Tensor:
        """Several tokens a row: (tokens of the step, heads, size) -> (tokens of the group, heads, size of a value)."""
        mask = None
        if not self._fresh or options.window is not None or options.softcap is not None:
            mask = self._mask(options.window, queries.dtype)
        keys, values = map(self._padded, own) if self._fresh else map(self._view, cached)
        output = _attend(self._padded(queries), keys, values, mask, options).transpose(1, 2)
        return output.flatten(0, 1).index_select(0, self._packing)

    def _view(self, layer: torch.Tensor) -> torch.Tensor:
        """A layer's memory -> (rows, heads, reach, size), without a copy."""
        slots = layer[self._memory].view(self.rows, self._heads, self._size, -1)
        return slots[:, :, : self._reach]

    def _padded(self, packed: torch.Tensor) -> torch.Tensor:
        """(tokens of the step, heads, size) -> (rows, heads, longest, size)."""
        chosen = packed.index_select(0, self._padding)
        return chosen.view(self.rows, self.longest, *packed.shape[1:]).transpose(1, 2)

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """The mask to add to the scores: (rows, 1, longest, reach), or (rows * heads, 1, reach) for rows that decode.

        A query sees itself and the tokens before it.
        """
        mask = self._masks.get(window)
        if mask is None:
            begins = torch.tensor(self._begins, device=self._device)
            queries = begins[:, None] + torch.arange(self.longest, device=self._device)
            keys = torch.arange(self._reach, device=self._device)
            hidden = keys > queries[:, :, None]
            if window is not None:
                hidden |= keys <= queries[:, :, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self._device).masked_fill_(hidden, -torch.inf)[:, None]
            if self.longest == 1 and not self._fused:
                mask = mask.expand(-1, self._heads, -1, -1).reshape(-1, 1, self._reach)
            self._masks[window] = mask
        return mask


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, options: _Options
) -> torch.Tensor:
    """(rows, heads, queries, size) over (rows, heads of keys, reach, size); no mask means that it is causal."""
    if options.softcap is None:
        return scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=options.scaling, enable_gqa=True
        )
    assert mask is not None, "the kernel knows no soft cap, so the mask is made"
    folded = queries.reshape(queries.shape[0], keys.shape[1], -1, *queries.shape[2:])
    scores = torch.matmul(folded.flatten(2, 3), keys.transpose(2, 3)).view(*folded.shape[:4], -1)
    shares = _capped(scores, options.scaling, options.softcap).add_(mask[:, :, None]).softmax(dim=-1)
    return torch.matmul(shares.flatten(2, 3), values).view(*queries.shape[:3], -1)


def _capped(scores: torch.Tensor, scaling: float, softcap: float) -> torch.Tensor:
    """Scores scaled and drawn into the range of a soft cap, in their own memory."""
    return scores.mul_(scaling / softcap).tanh_().mul_(softcap)


def _copies_parts(cache: Cache) -> bool:
    """True where a product with a part of a slot copies that part first, as a CPU does in 16 bits."""
    return cache.device.type == "cpu" and cache.keys.dtype.itemsize < torch.float32.itemsize


def _groups(pieces: Sequence[Piece[Any]], cache: Cache, *, fixed: bool) -> Iterator[_Group]:
    """Pieces that are computed together, in their order."""
    first = 0
    together: list[Piece[Any]] = []
    for piece in pieces:
        if together and not _joins(piece, together, fixed=fixed):
            group = _Group(together, first, cache, fixed=fixed)
            yield group
            first, together = group.tokens.stop, []
        together.append(piece)
    yield _Group(together, first, cache, fixed=fixed)


def _joins(piece: Piece[Any], group: Sequence[Piece[Any]], *, fixed: bool) -> bool:
    before = group[-1]
    single, singles = piece.end - piece.begin == 1, before.end - before.begin == 1
    if single or singles:
        return single and singles and _neighbours(piece, before)
    fresh, freshes = _fresh(piece, fixed=fixed), _fresh(before, fixed=fixed)
    if fresh != freshes or not (fresh or _neighbours(piece, before)):
        return False
    together = [*group, piece]
    longest = max(each.end - each.begin for each in together)
    reach = max(each.end for each in together)
    needed = sum((each.end - each.begin) * each.end for each in together)
    return len(together) * longest * reach <= PADDING * needed + CALL


def _neighbours(piece: Piece[Any], before: Piece[Any]) -> bool:
    slot, neighbour = piece.row.held, before.row.held
    return (slot.start, slot.size) == (neighbour.end, neighbour.size)


def _fresh(piece: Piece[Any], *, fixed: bool) -> bool:
    """True for a piece that begins its row, and so needs nothing of the cache."""
    return not (piece.begin or fixed)
