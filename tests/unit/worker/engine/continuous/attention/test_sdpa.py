"""Attention over the cache against its definition, one query at a time, for any pieces of any rows in one step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmill.worker.engine.continuous.attention import sdpa
from batchmill.worker.engine.continuous.attention.cache import Cache, CacheShape
from batchmill.worker.engine.continuous.attention.sdpa import SdpaAttention
from batchmill.worker.engine.continuous.scheduling.slots import Slots
from batchmill.worker.engine.continuous.scheduling.step import Piece, Row

CPU = torch.device("cpu")
HEADS, SIZE, VALUE_SIZE = 2, 4, 3
LONGEST = 40
Numbers = tuple[int, int]


def pieces_of(ends: Sequence[Numbers]) -> list[Piece[Row]]:
    """A piece for each (begin, end), in slots of an arena, some of which are neighbours."""
    slots = Slots(2_048, longest=64, smallest=8)
    rows = [Row([0] * end, LONGEST, share=False) for _, end in ends]
    for row in rows:
        row.slot = slots.take(len(row.tokens))
    pieces = [Piece(row, begin, end) for row, (begin, end) in zip(rows, ends, strict=True)]
    return sorted(pieces, key=lambda piece: (piece.end - piece.begin > 1, piece.begin == 0, piece.row.held.start))


class Known(NamedTuple):
    """A row's keys and values, (tokens, heads, size)."""

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, piece: Piece[Row]) -> Known:
        return cls(torch.randn(piece.end, HEADS, SIZE), torch.randn(piece.end, HEADS, VALUE_SIZE))

    def seen(self, query: torch.Tensor, place: int, *, window: int | None, softcap: float | None) -> torch.Tensor:
        """Attention of the query (heads, size) at this position, by the formula."""
        first = max(0, place + 1 - window) if window else 0
        shared = len(query) // HEADS
        keys, values = (each[first : place + 1].repeat_interleave(shared, dim=1) for each in self)
        scores = torch.einsum("hd,thd->ht", query, keys) * 0.5
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        return torch.einsum("ht,thd->hd", scores.softmax(dim=-1), values)


numbers = st.integers(1, LONGEST).flatmap(lambda end: st.tuples(st.integers(0, end - 1), st.just(end)))
decoding = st.integers(1, LONGEST).map(lambda end: (end - 1, end))
beginning = st.integers(1, LONGEST).map(lambda end: (0, end))


@settings(max_examples=150)
@given(
    ends=st.lists(numbers | decoding | beginning, min_size=1, max_size=24),
    shared=st.sampled_from([1, 2, 3]),
    window=st.none() | st.integers(1, LONGEST),
    softcap=st.none() | st.just(2.0),
    fixed=st.booleans(),
    call=st.sampled_from([0, sdpa.CALL]),
    unused=st.integers(0, 3),
)
def test_each_query_sees_itself_and_what_its_row_has_before(
    ends: list[Numbers],
    shared: int,
    window: int | None,
    softcap: float | None,
    fixed: bool,
    call: int,
    unused: int,
) -> None:
    pieces = pieces_of(ends)
    torch.manual_seed(len(ends))
    known = [Known.of(piece) for piece in pieces]
    cache = Cache(CacheShape(1, HEADS, SIZE, VALUE_SIZE, torch.float32), 2_048 + 8, CPU, heads_first=True)
    for (row, begin, _), each in zip(pieces, known, strict=True):
        slot = slice(row.held.start * HEADS, row.held.end * HEADS)
        cache.keys[0][slot].view(HEADS, row.held.size, -1)[:, :begin] = each.keys[:begin].transpose(0, 1)
        cache.values[0][slot].view(HEADS, row.held.size, -1)[:, :begin] = each.values[:begin].transpose(0, 1)
    borders = [0, *accumulate(end - begin for _, begin, end in pieces)]
    queries = torch.randn(borders[-1] + unused, HEADS * shared, SIZE)
    asked = [(each.keys[piece.begin :], each.values[piece.begin :]) for each, piece in zip(known, pieces, strict=True)]
    asked += [(torch.ones(unused, HEADS, SIZE), torch.ones(unused, HEADS, VALUE_SIZE))]
    with patch.object(sdpa, "CALL", call):
        attend = SdpaAttention(cache, fixed=fixed)
        attend.plan(pieces, unused=[2_048] * unused)
        found, _ = attend(
            SimpleNamespace(layer_idx=0),  # type: ignore[arg-type]
            *(torch.cat(each).transpose(0, 1)[None] for each in ([queries], *zip(*asked, strict=True))),
            None,
            scaling=0.5,
            sliding_window=window,
            softcap=softcap,
        )
    assert found.shape == (1, len(queries), HEADS * shared, VALUE_SIZE)
    for first, (_, begin, end), each in zip(borders, pieces, known, strict=False):
        for place in range(begin, end):
            at = first + place - begin
            wanted = each.seen(queries[at], place, window=window, softcap=softcap)
            torch.testing.assert_close(found[0, at], wanted, rtol=1e-4, atol=1e-5)
