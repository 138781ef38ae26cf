"""Computes the size of a generate engine, whose cache transformers allocates anew for each micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from batchmill.jobs.models.engine_facts import EngineLimits
from batchmill.worker.engine.options import EngineChoice, EngineOptions
from batchmill.worker.engine.sizing import Load, MemoryBudget

#: Requests that run together by default.
GENERATE_ROWS = 64
#: The cache of a micro-batch is planned to take one part of the free memory in this many: a layer's cache is copied
#: whenever it grows, and reading the prompts takes memory of the same order.
MEMORY_PARTS = 3


@dataclass(frozen=True, slots=True)
class GenerateSize:
    """The work that a generate engine takes on at once, and the memory that this takes."""

    limits: EngineLimits
    #: Cache places of a micro-batch.
    places: int
    #: Bytes of copies of weights: it makes none.
    copied_bytes: int = 0
    #: Bytes that a step's own buffers are planned with: they count among the spare ones.
    buffers_bytes: int = 0

    def rows_of(self, row_tokens: int) -> int:
        """Counts the rows of this context that the cache of a micro-batch holds at once."""
        return min(self.limits.rows, self.places // row_tokens)

    def spare_bytes(self, cache_bytes: int) -> int:
        """Bytes that must stay free: a multiple of the cache."""
        return (MEMORY_PARTS - 1) * cache_bytes


def size(load: Load, budget: MemoryBudget, options: EngineOptions) -> GenerateSize:
    """Computes the size of an engine beside these weights."""
    places = budget.free_bytes // (MEMORY_PARTS * load.token_bytes)
    context = min(filter(None, (options.context_tokens, load.context_tokens)), default=None)
    rows = options.max_rows or GENERATE_ROWS
    return GenerateSize(EngineLimits(EngineChoice.GENERATE.value, rows, context, places), places)
