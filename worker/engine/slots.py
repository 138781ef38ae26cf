"""Where a row's keys and values lie in the cache: slots of a few sizes, cut from an arena of token places.

Owns which places are taken. It knows no tensor, no request and no model: sizes go in, places come out.

A row's slot is one contiguous span, so that neighbours of one size are read as one block of memory, with no gather.
Sizes double from `smallest` on; a row that outgrows its slot moves to a larger one, which copies each of its tokens
once on average. The arena is cut into chunks, each of which holds slots of one size while any of them is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import NamedTuple

#: Slots begin at this many tokens.
SMALLEST_TOKENS = 64
#: A chunk has so many places, that many small slots are neighbours; but there are so many chunks, where they can be.
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

    def __init__(self, start: int, end: int, size: int) -> None:
        self.start = start
        self.free = list(range(start, end - size + 1, size))
        self.slots = len(self.free)
        heapify(self.free)

    @property
    def empty(self) -> bool:
        return len(self.free) == self.slots


class Slots:
    """An arena of about `tokens` places, and no fewer than one row of `longest` tokens takes."""

    def __init__(self, tokens: int, *, longest: int, smallest: int = SMALLEST_TOKENS) -> None:
        self._sizes = tuple(_sizes(smallest, longest))
        largest = self._sizes[-1]
        self._chunk_tokens = _up(max(largest, min(CHUNK_TOKENS, tokens // CHUNKS)), largest)
        chunks = max(1, tokens // self._chunk_tokens)
        #: Places in all, which is what the cache has to hold.
        self.tokens = chunks * self._chunk_tokens
        self._unused = [number * self._chunk_tokens for number in range(chunks)]
        self._chunks: dict[int, list[_Chunk]] = {size: [] for size in self._sizes}
        #: Places that no slot has.
        self.free_tokens = self.tokens

    @property
    def longest(self) -> int:
        """The size of the largest slots."""
        return self._sizes[-1]

    def size_for(self, tokens: int) -> int:
        """The size of the slot that a row of so many tokens gets; AssertionError beyond `longest`."""
        assert tokens <= self._sizes[-1], "a row is never longer than the longest"
        return next(size for size in self._sizes if size >= tokens)

    def take(self, tokens: int) -> Slot | None:
        """The lowest free slot for so many tokens, or None if there is none."""
        size = self.size_for(tokens)
        chunk = next((each for each in self._chunks[size] if each.free), None) or self._cut(size)
        if chunk is None:
            return None
        self.free_tokens -= size
        return Slot(heappop(chunk.free), size)

    def give(self, slot: Slot) -> None:
        """Takes a slot back."""
        chunks = self._chunks[slot.size]
        chunk = next(each for each in chunks if each.start <= slot.start < each.start + self._chunk_tokens)
        heappush(chunk.free, slot.start)
        self.free_tokens += slot.size
        if chunk.empty:
            chunks.remove(chunk)
            heappush(self._unused, chunk.start)

    def below(self, slot: Slot) -> bool:
        """Whether a slot of the same size is free at a lower place, so that moving there closes a hole."""
        return any(each.free and each.free[0] < slot.start for each in self._chunks[slot.size])

    def _cut(self, size: int) -> _Chunk | None:
        if not self._unused:
            return None
        start = heappop(self._unused)
        chunk = _Chunk(start, start + self._chunk_tokens, size)
        chunks = self._chunks[size]
        chunks.append(chunk)
        chunks.sort(key=lambda each: each.start)
        return chunk


def _sizes(smallest: int, longest: int) -> Iterator[int]:
    size = smallest
    while size < longest:
        yield size
        size *= 2
    yield _up(longest, smallest)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
