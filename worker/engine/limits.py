"""How much a worker takes on at once: rows, context and cache, from what is asked and from the memory that is free.

Owns that arithmetic. It knows no request; what is found too much while working is `capacity`'s matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.engine.cache import CacheShape
from worker.engine.options import EngineOptions
from worker.loader import LoadedModel
from worker.telemetry import MemoryReader

#: Rows where nothing else is asked, and tokens of one step: those of the rows that decode, and of prompts.
CPU_ROWS, CPU_STEP_TOKENS = 128, 512
CUDA_ROWS, CUDA_STEP_TOKENS = 256, 4_096
#: The context of a model that says nothing of its own.
CONTEXT_TOKENS = 4_096
#: What of a GPU's memory the engine plans with where nothing else is asked.
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
class Limits:
    """`context_tokens`: prompt and answer together. `cache_tokens`: of all rows. `step_tokens`: of one forward."""

    rows: int
    context_tokens: int
    cache_tokens: int
    step_tokens: int


def copy_bytes(loaded: LoadedModel, options: EngineOptions) -> int:
    """What copies of weights may take, if they are optional."""
    parts = CPU_PARTS if loaded.device.type == "cpu" else COPY_PARTS
    return _free_bytes(loaded, options) // parts


def limits(loaded: LoadedModel, shape: CacheShape, options: EngineOptions) -> Limits:
    """The limits of a worker, once everything but the cache is on its device."""
    cuda = loaded.device.type == "cuda"
    context = options.context_tokens or loaded.context_tokens or CONTEXT_TOKENS
    rows = options.max_rows or (CUDA_ROWS if cuda else CPU_ROWS)
    cache = _cache_bytes(loaded, options) // shape.token_bytes
    if options.max_rows is None:
        rows = max(1, min(rows, cache // min(ROW_TOKENS, context)))
    context = max(1, min(context, cache))
    step = max(CUDA_STEP_TOKENS if cuda else CPU_STEP_TOKENS, rows)
    return Limits(rows, context, min(cache, rows * context), step)


def _cache_bytes(loaded: LoadedModel, options: EngineOptions) -> int:
    free = _free_bytes(loaded, options)
    if options.cache_bytes is not None:
        return min(options.cache_bytes, free)
    return free // CPU_PARTS if loaded.device.type == "cpu" else free


def _free_bytes(loaded: LoadedModel, options: EngineOptions) -> int:
    """What the engine may still take; on a GPU within its fraction, and beside the buffers of a step."""
    free = MemoryReader(str(loaded.device)).available_bytes()
    if loaded.device.type == "cpu":
        return free
    total = torch.cuda.get_device_properties(loaded.device).total_memory
    kept = total * (1 - (options.memory_fraction or MEMORY_FRACTION))
    buffers = max(loaded.weights_bytes // BUFFERS_PART, BUFFERS_BYTES)
    return max(0, int(free - kept - buffers))
