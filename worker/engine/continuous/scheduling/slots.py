"""Slots of the KV cache: spans of a few sizes, one for each row, cut from an arena of token places.

Owns the places that are taken. It knows no tensor, no request and no model: sizes go in, places come out.

A row's slot is one contiguous span, so that neighbours of one size are read as one block of memory, with no gather.
Sizes double from `smallest` on; a row that outgrows its slot moves to a larger one, which copies each of its tokens
once on average. The arena is made of chunks: each holds small slots of one size while any of them is taken, and a slot
that is larger than a chunk takes several in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from typing import NamedTuple

#: Slots begin at this many tokens.
SMALLEST_TOKENS = 64
#: The places of a chunk, so that many small slots are neighbours; fewer where there would not be so many chunks.
CHUNK_TOKENS, CHUNKS = 16_384, 16


class Slot(NamedTuple):
    """The places from `start` on, `size` of them."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


class _Chunk:
    """Slots of one size; `free` is a heap of their starts."""

    def __init__(self, start: int, tokens: int, size: int) -> None:
        self.start = start
        self.free = list(range(start, start + tokens - size + 1, size))
        self._slots = len(self.free)

    @property
    def empty(self) -> bool:
        return len(self.free) == self._slots


class Slots:
    """An arena of about `tokens` places, and no fewer than one row of `longest` tokens takes."""

    def __init__(self, tokens: int, *, longest: int, smallest: int = SMALLEST_TOKENS) -> None:
        self._sizes = tuple(_sizes(smallest, longest))
        self._chunk_tokens = smallest
        while 2 * self._chunk_tokens <= min(CHUNK_TOKENS, tokens // CHUNKS):
            self._chunk_tokens *= 2
        chunks = max(tokens // self._chunk_tokens, self._chunks_of(self.longest))
        #: All places, which the cache has to hold.
        self.tokens = chunks * self._chunk_tokens
        #: Places that no slot has.
        self.free_tokens = self.tokens
        self._unused = [True] * chunks
        self._cut: dict[int, list[_Chunk]] = {size: [] for size in self._sizes}

    @property
    def longest(self) -> int:
        """The size of the largest slots."""
        return self._sizes[-1]

    def size_for(self, tokens: int) -> int:
        """Returns the size of the slot that a row of so many tokens gets; AssertionError beyond `longest`."""
        assert tokens <= self.longest, "a row is never longer than the longest"
        return next(size for size in self._sizes if size >= tokens)

    def take(self, tokens: int) -> Slot | None:
        """Takes the lowest free slot for so many tokens; None if there is none."""
        size = self.size_for(tokens)
        start = self._lowest(size)
        if start is None:
            return None
        self.free_tokens -= self._places(size)
        if size > self._chunk_tokens:
            self._mark(start, size, unused=False)
        else:
            chunk = next((each for each in self._cut[size] if each.free), None) or self._cut_at(start, size)
            heappop(chunk.free)
        return Slot(start, size)

    def give(self, slot: Slot) -> None:
        """Takes a slot back."""
        self.free_tokens += self._places(slot.size)
        if slot.size > self._chunk_tokens:
            self._mark(slot.start, slot.size, unused=True)
            return
        chunks = self._cut[slot.size]
        chunk = next(each for each in chunks if each.start <= slot.start < each.start + self._chunk_tokens)
        heappush(chunk.free, slot.start)
        if chunk.empty:
            chunks.remove(chunk)
            self._mark(chunk.start, self._chunk_tokens, unused=True)

    def below(self, slot: Slot) -> bool:
        """True where a slot of the same size is free at a lower place, so that moving there closes a hole."""
        if slot.size > self._chunk_tokens:
            lowest = self._lowest(slot.size)
            return lowest is not None and lowest < slot.start
        return any(each.free and each.free[0] < slot.start for each in self._cut[slot.size])

    def _lowest(self, size: int) -> int | None:
        """Finds the start of the lowest free slot of this size."""
        chunk = next((each for each in self._cut[size] if each.free), None)
        if chunk is not None:
            return chunk.free[0]
        wanted = self._chunks_of(size)
        run = 0
        for number, unused in enumerate(self._unused):
            run = run + 1 if unused else 0
            if run == wanted:
                return (number + 1 - wanted) * self._chunk_tokens
        return None

    def _cut_at(self, start: int, size: int) -> _Chunk:
        self._mark(start, self._chunk_tokens, unused=False)
        chunk = _Chunk(start, self._chunk_tokens, size)
        self._cut[size].append(chunk)
        self._cut[size].sort(key=lambda each: each.start)
        return chunk

    def _mark(self, start: int, size: int, *, unused: bool) -> None:
        first = start // self._chunk_tokens
        for number in range(first, first + self._chunks_of(size)):
            self._unused[number] = unused

    def _chunks_of(self, size: int) -> int:
        return -(-size // self._chunk_tokens)

    def _places(self, size: int) -> int:
        return size if size <= self._chunk_tokens else self._chunks_of(size) * self._chunk_tokens


def _sizes(smallest: int, longest: int) -> Iterator[int]:
    size = smallest
    while size < longest:
        yield size
        size *= 2
    yield -(-longest // smallest) * smallest
