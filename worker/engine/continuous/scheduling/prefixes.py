"""Prefixes that rows have in common, so that one row copies what another has computed.

Owns the index of the prefixes of the rows in the cache, and the order of requests that brings common ones together.
It knows no tensor and no slot.

A prompt is cut into blocks; the hash of a block covers everything before it and the adapter, so that one lookup finds
the row with the longest common prefix. Hashes only propose: adapters and the tokens themselves are compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from batchmill.jobs.requests.generation import GenerationRequest

#: Shorter prefixes are computed again: that costs no more than copying them.
BLOCK_TOKENS = 32


class Beginning(Protocol):
    """A row as the index of prefixes sees it."""

    tokens: list[int]
    #: The number of its adapter; only rows of one number have a prefix in common.
    adapter: int
    #: The hashes of its prompt's blocks.
    blocks: tuple[int, ...]
    #: Tokens that have keys and values in the cache.
    computed: int


B = TypeVar("B", bound=Beginning)


def block_hashes(tokens: Sequence[int], *, adapter: int = 0) -> tuple[int, ...]:
    """Makes one hash a full block, of all tokens up to the block's end and of the adapter that computes them."""
    return tuple(_chained(tokens, adapter))


def _chained(tokens: Sequence[int], chain: int) -> Iterator[int]:
    for begin in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        chain = hash((chain, *tokens[begin : begin + BLOCK_TOKENS]))
        yield chain


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Counts the tokens that both begin with."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(place for place in range(length) if one[place] != other[place])


def by_beginning(requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    """Sorts requests so that those with a common prefix are neighbours."""
    return sorted(requests, key=_beginning)


def _beginning(request: GenerationRequest) -> tuple[str, str, str]:
    """The values that decide the first tokens of a prompt, in this order: adapter, tools, text."""
    text = json.dumps(request.messages) if request.prompt is None else request.prompt
    return request.adapter or "", json.dumps(request.tools), text


class Prefixes(Generic[B]):
    """The rows in the cache by the blocks that their prompts begin with."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[B, None]] = {}

    def enter(self, row: B) -> None:
        """Adds a row that is in the cache, or about to be."""
        for block in row.blocks:
            self._rows.setdefault(block, {})[row] = None

    def leave(self, row: B) -> None:
        for block in row.blocks:
            rows = self._rows[block]
            del rows[row]
            if not rows:
                del self._rows[block]

    def knows(self, row: B) -> bool:
        """True where a row in the cache begins with this one's first block."""
        return bool(row.blocks) and row.blocks[0] in self._rows

    def alone(self, row: B) -> bool:
        """True where no other row in the cache begins with this one's first block."""
        return bool(row.blocks) and len(self._rows[row.blocks[0]]) == 1

    def nearest(self, row: B) -> tuple[B, int] | None:
        """Finds the row with the longest common prefix, and the tokens of that; of several, the one computed furthest.

        One token of a prompt is always left to compute: the next token is sampled from its logits.
        """
        for block in reversed(row.blocks):
            rows = [each for each in self._rows.get(block, ()) if each.adapter == row.adapter]
            if rows:
                donor = max(rows, key=lambda each: each.computed)
                tokens = min(common(row.tokens, donor.tokens), len(row.tokens) - 1)
                return (donor, tokens) if tokens >= BLOCK_TOKENS else None
        return None
