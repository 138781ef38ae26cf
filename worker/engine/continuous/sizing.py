"""Computes the size of a continuous engine: rows, context and cache, from its options and the memory that is free.

Owns that arithmetic, which needs no model. It knows no request; `capacity` shrinks steps that run out of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchmill.jobs.models.engine_facts import EngineLimits
from batchmill.worker.engine.continuous.attention.flash import PAGE_TOKENS
from batchmill.worker.engine.continuous.scheduling.slots import SMALLEST_TOKENS, Slots
from batchmill.worker.engine.options import Dequantize, EngineChoice, EngineOptions
from batchmill.worker.engine.sizing import Load, MemoryBudget

#: Rows by default, and tokens of one step: those of the rows that decode, and of prompts.
CPU_ROWS, CPU_STEP_TOKENS = 256, 512
CUDA_ROWS, CUDA_STEP_TOKENS = 256, 4_096
#: Fewer rows run on a CPU where their logits would take more in float32.
CPU_LOGITS_BYTES = 64 * 1024**2
#: The context of a model whose configuration names none.
CONTEXT_TOKENS = 4_096
#: The part of a GPU's memory that the engine plans with by default.
MEMORY_FRACTION = 0.9
#: A step's own buffers are planned to take this part of the weights, or these bytes where that is less.
BUFFERS_PART, BUFFERS_BYTES = 10, 256 * 1024**2
#: One part in so many of a CPU's free memory is the cache's at most, and as much the copies' of weights.
CPU_PARTS = 3
#: A GPU's free memory goes to the copies of weights up to one part in so many; the cache has what is left.
COPY_PARTS = 2
#: Fewer rows run where the cache does not hold so many tokens of each.
ROW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class ContinuousSize:
    """The work that a continuous engine takes on at once, and the memory that this takes."""

    limits: EngineLimits
    #: Tokens of one forward.
    step_tokens: int
    #: Tokens of the longest row.
    longest_tokens: int
    #: Tokens that the arena of slots is asked to hold.
    arena_tokens: int
    #: Tokens of the smallest slot.
    smallest_tokens: int
    #: Bytes of the copies of weights that are still to be made.
    copied_bytes: int
    #: Bytes that a step's own buffers are planned with.
    buffers_bytes: int
    #: Bytes of a GPU that are left free; None on a CPU.
    kept_bytes: int | None

    def slots(self) -> Slots:
        """Makes the empty arena of this cache."""
        return Slots(self.arena_tokens, longest=self.longest_tokens, smallest=self.smallest_tokens)

    def rows_of(self, row_tokens: int) -> int:
        """Counts the rows of this context that the cache holds at once."""
        slots, rows = self.slots(), 0
        if self.longest_tokens >= row_tokens:
            while rows < self.limits.rows and slots.take(row_tokens) is not None:
                rows += 1
        return rows

    def spare_bytes(self, cache_bytes: int) -> int:
        """Bytes that must stay free: of a GPU a fraction, and else a multiple of the cache."""
        return (CPU_PARTS - 1) * cache_bytes if self.kept_bytes is None else self.kept_bytes


def size(load: Load, budget: MemoryBudget, options: EngineOptions, *, pages: bool | None = None) -> ContinuousSize:
    """Computes the size of an engine beside these weights.

    `pages`: the device's kernel reads the cache in pages; None plans with them on every GPU.
    """
    copied = _copied_bytes(load, budget, options)
    usable = _usable_bytes(load, budget, options, taken_bytes=copied)
    cache = _cache_bytes(budget, options, usable) // load.token_bytes
    context = options.context_tokens or load.context_tokens or CONTEXT_TOKENS
    rows = options.max_rows or max(1, min(_rows(budget, load.vocabulary), cache // min(ROW_TOKENS, context)))
    context = max(1, min(context, cache))
    arena = min(cache, rows * context)
    smallest = PAGE_TOKENS if (budget.cuda if pages is None else pages) else SMALLEST_TOKENS
    tokens = Slots(arena, longest=context, smallest=smallest).tokens
    return ContinuousSize(
        EngineLimits(EngineChoice.CONTINUOUS.value, rows, context, tokens),
        max(CUDA_STEP_TOKENS if budget.cuda else CPU_STEP_TOKENS, rows),
        context,
        arena,
        smallest,
        copied,
        _buffers_bytes(load, budget),
        _kept_bytes(budget, options) if budget.cuda else None,
    )


def copies_budget_bytes(load: Load, budget: MemoryBudget, options: EngineOptions) -> int:
    """Bytes that copies of weights may take, if they are optional."""
    return _usable_bytes(load, budget, options) // (COPY_PARTS if budget.cuda else CPU_PARTS)


def _copied_bytes(load: Load, budget: MemoryBudget, options: EngineOptions) -> int:
    """Bytes of the copies that will be made: all of them, or none."""
    if options.dequantize is Dequantize.NEVER:
        return 0
    always = options.dequantize is Dequantize.ALWAYS
    return load.copy_bytes if always or load.copy_bytes <= copies_budget_bytes(load, budget, options) else 0


def _usable_bytes(load: Load, budget: MemoryBudget, options: EngineOptions, *, taken_bytes: int = 0) -> int:
    """Bytes that the engine may still take; on a GPU within its fraction, and beside the buffers of a step."""
    free = max(0, budget.free_bytes - taken_bytes)
    if not budget.cuda:
        return free
    return max(0, int(free - budget.total_bytes * _kept_part(options) - _buffers_bytes(load, budget)))


def _kept_part(options: EngineOptions) -> float:
    return 1 - (options.memory_fraction or MEMORY_FRACTION)


def _kept_bytes(budget: MemoryBudget, options: EngineOptions) -> int:
    return int(budget.total_bytes * _kept_part(options))


def _buffers_bytes(load: Load, budget: MemoryBudget) -> int:
    return max(load.weights_bytes // BUFFERS_PART, BUFFERS_BYTES) if budget.cuda else 0


def _rows(budget: MemoryBudget, vocabulary: int) -> int:
    return CUDA_ROWS if budget.cuda else min(CPU_ROWS, CPU_LOGITS_BYTES // (torch.float32.itemsize * vocabulary))


def _cache_bytes(budget: MemoryBudget, options: EngineOptions, usable_bytes: int) -> int:
    if options.cache_bytes is not None:
        return min(options.cache_bytes, usable_bytes)
    return usable_bytes if budget.cuda else usable_bytes // CPU_PARTS
