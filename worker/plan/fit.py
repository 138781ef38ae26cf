"""The part of a model that fits on a device: rows of a context, beside the weights, as its engine counts.

The arithmetic is the engines' own, so that a plan and a worker say the same. It knows no model and no
quantization: bytes go in.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchmill.jobs.models.engine_facts import EngineLimits
from batchmill.worker.engine.continuous import sizing as continuous
from batchmill.worker.engine.generate import sizing as generate
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.sizing import Load, MemoryBudget, Size
from batchmill.worker.plan.hardware import Hardware

#: Weights that are split get this part of what is free, as worker.models.layout has it.
SPLIT_PART = 0.9


@dataclass(frozen=True, slots=True)
class Fit:
    """A worker as it would come up."""

    #: Limits that the engine would report.
    limits: EngineLimits
    #: Rows of the planned context that its cache holds at once.
    rows: int
    weights_bytes: int
    #: Bytes of the cache of the rows that were asked for, or of one.
    cache_bytes: int
    #: Bytes of the buffers of a step.
    buffers_bytes: int
    #: Bytes of the copies of 4-bit weights that it makes since memory is left for them.
    copied_bytes: int
    #: Bytes that it leaves free, by its rules.
    spare_bytes: int
    #: All of this is there.
    fits: bool

    @property
    def total_bytes(self) -> int:
        """Bytes that the worker takes: weights, buffers and the cache of these rows."""
        return self.weights_bytes + self.buffers_bytes + self.cache_bytes

    @property
    def needed_bytes(self) -> int:
        """Bytes that must be free for the worker."""
        return self.total_bytes + self.copied_bytes + self.spare_bytes


def fit(load: Load, hardware: Hardware, options: EngineOptions, *, is_continuous: bool, row_tokens: int) -> Fit:
    """Plans a worker with these options on this device, with rows of `row_tokens`.

    `is_continuous`: the continuous engine serves the model where it lies on one device; else generate does.
    """
    free = max(0, hardware.free_bytes - load.weights_bytes) // hardware.count
    budget = MemoryBudget(hardware.cuda, free, hardware.total_bytes)
    spread = hardware.count > 1  # the continuous engine takes one device alone
    size: Size = (continuous if is_continuous and not spread else generate).size(load, budget, options)
    wanted_rows, rows = options.max_rows or 1, size.rows_of(row_tokens)
    cache = wanted_rows * row_tokens * load.token_bytes
    usable_bytes = hardware.free_bytes * (SPLIT_PART if spread else 1)
    return Fit(
        size.limits,
        rows,
        load.weights_bytes,
        cache,
        size.buffers_bytes,
        size.copied_bytes,
        hardware.count * (cache + size.spare_bytes(cache)) - cache,
        fits=load.weights_bytes + size.copied_bytes <= usable_bytes and rows >= wanted_rows,
    )
