"""How much a worker takes on at once: rows, context and cache, from what is asked and from the memory that is free.

Owns that arithmetic, which needs no model: what is planned before one is loaded is counted by it, too. It knows no
request; what is found too much while working is `capacity`'s matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from batchmill.worker.devices.memory import MemoryReader
from batchmill.worker.engine.options import EngineOptions

if TYPE_CHECKING:
    from batchmill.worker.models.load import LoadedModel

#: Rows where nothing else is asked, and tokens of one step: those of the rows that decode, and of prompts.
CPU_ROWS, CPU_STEP_TOKENS = 256, 512
CUDA_ROWS, CUDA_STEP_TOKENS = 256, 4_096
#: Fewer rows run on a CPU where their logits would take more in float32.
CPU_LOGITS_BYTES = 64 * 1024**2
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


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that an engine finds on its device. `free_bytes`: beside the weights. `total_bytes`: of a GPU."""

    cuda: bool
    free_bytes: int
    total_bytes: int
    weights_bytes: int

    @classmethod
    def of(cls, loaded: LoadedModel) -> Room:
        """What is there now."""
        cuda = loaded.device.type == "cuda"
        total = torch.cuda.get_device_properties(loaded.device).total_memory if cuda else 0
        return cls(cuda, MemoryReader(str(loaded.device)).available_bytes(), total, loaded.weights_bytes)

    def usable_bytes(self, options: EngineOptions) -> int:
        """What the engine may still take; on a GPU within its fraction, and beside the buffers of a step."""
        if not self.cuda:
            return self.free_bytes
        kept = self.total_bytes * (1 - (options.memory_fraction or MEMORY_FRACTION))
        return max(0, int(self.free_bytes - kept - self.buffers_bytes))

    @property
    def buffers_bytes(self) -> int:
        """What a step's own buffers are planned with on a GPU."""
        return max(self.weights_bytes // BUFFERS_PART, BUFFERS_BYTES) if self.cuda else 0


def copy_bytes(room: Room, options: EngineOptions) -> int:
    """What copies of weights may take, if they are optional."""
    return room.usable_bytes(options) // (COPY_PARTS if room.cuda else CPU_PARTS)


def limits(
    room: Room, options: EngineOptions, *, token_bytes: int, context_tokens: int | None, vocabulary: int
) -> Limits:
    """The limits of a worker, once everything but the cache is on its device.

    `token_bytes`: of one token in the cache. `context_tokens`: the model's own, None for no limit.
    """
    context = options.context_tokens or context_tokens or CONTEXT_TOKENS
    cache = _cache_bytes(room, options) // token_bytes
    rows = options.max_rows or max(1, min(_rows(room, vocabulary), cache // min(ROW_TOKENS, context)))
    context = max(1, min(context, cache))
    step = max(CUDA_STEP_TOKENS if room.cuda else CPU_STEP_TOKENS, rows)
    return Limits(rows, context, min(cache, rows * context), step)


def _rows(room: Room, vocabulary: int) -> int:
    return CUDA_ROWS if room.cuda else min(CPU_ROWS, CPU_LOGITS_BYTES // (torch.float32.itemsize * vocabulary))


def _cache_bytes(room: Room, options: EngineOptions) -> int:
    usable = room.usable_bytes(options)
    if options.cache_bytes is not None:
        return min(options.cache_bytes, usable)
    return usable if room.cuda else usable // CPU_PARTS
