"""What of a model fits on a device: rows of a context, beside the weights, as the engine that serves it counts.

The arithmetic is the engines' own, so that a plan and a worker say the same. It knows no model and no
quantization: bytes go in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from batchmill.worker.engine.continuous.execution.flash import PAGE_TOKENS
from batchmill.worker.engine.continuous.scheduling.limits import CPU_PARTS, MEMORY_FRACTION, Room, copy_bytes, limits
from batchmill.worker.engine.continuous.scheduling.slots import SMALLEST_TOKENS, Slots
from batchmill.worker.engine.generate.engine import GENERATE_ROWS, MEMORY_PARTS
from batchmill.worker.engine.options import Dequantize, EngineKind, EngineOptions
from batchmill.worker.plan.hardware import Hardware

#: Weights that are split get this part of what is free, as worker.models.layout has it.
SPLIT_PART = 0.9


@dataclass(frozen=True, slots=True)
class Load:
    """What is put on a device. `token_bytes`: of a token in the cache. `copy_bytes`: of the copies that could be made.

    `context_tokens`: the model's own, None for no limit. `vocabulary`: its tokens. `continuous`: served by that engine,
    or else by generate.
    """

    weights_bytes: int
    copy_bytes: int
    token_bytes: int
    context_tokens: int | None
    vocabulary: int
    continuous: bool


@dataclass(frozen=True, slots=True)
class Fit:
    """How a worker would come up, and by which engine.

    `engine_rows`, `context_tokens` and `cache_tokens` are what it would report. `rows`: how many of the planned
    context its cache holds at once. `cache_bytes`: of the rows that were asked for, or of one. `buffers_bytes`: of a
    step. `copied_bytes`: copies of 4-bit weights that it makes since memory is left for them. `spare_bytes`: what it
    leaves free, by its rules. `fits`: whether all of this is there.
    """

    engine_rows: int
    context_tokens: int
    cache_tokens: int
    rows: int
    weights_bytes: int
    cache_bytes: int
    buffers_bytes: int
    copied_bytes: int
    spare_bytes: int
    engine: EngineKind
    fits: bool

    @property
    def total_bytes(self) -> int:
        """What it takes: weights, buffers and the cache of these rows."""
        return self.weights_bytes + self.buffers_bytes + self.cache_bytes

    @property
    def needed_bytes(self) -> int:
        """What must be free for it."""
        return self.total_bytes + self.copied_bytes + self.spare_bytes


@dataclass(frozen=True, slots=True)
class _Engine:
    """Limits of an engine, and of rows of the planned context as many as its cache holds."""

    engine_rows: int
    context_tokens: int
    cache_tokens: int
    rows: int


def fit(load: Load, hardware: Hardware, options: EngineOptions, *, row_tokens: int) -> Fit:
    """What a worker with these options makes of this device, planned with rows of `row_tokens`."""
    if hardware.count > 1:
        load = replace(load, continuous=False)  # which takes no model whose layers are spread
    free = hardware.free_bytes - load.weights_bytes
    room = Room(hardware.cuda, max(0, free), hardware.total_bytes, load.weights_bytes)
    copied = _copied_bytes(load, room, options)
    room = replace(room, free_bytes=max(0, room.free_bytes - copied) // hardware.count)
    found = (_continuous if load.continuous else _generate)(load, room, options, row_tokens)
    asked = options.max_rows or 1
    cache = asked * row_tokens * load.token_bytes
    most = hardware.free_bytes * (SPLIT_PART if hardware.count > 1 else 1)
    return Fit(
        found.engine_rows,
        found.context_tokens,
        found.cache_tokens,
        found.rows,
        load.weights_bytes,
        cache,
        room.buffers_bytes if load.continuous else 0,
        copied,
        _spare_bytes(load, hardware, options, cache),
        EngineKind.CONTINUOUS if load.continuous else EngineKind.GENERATE,
        fits=load.weights_bytes + copied <= most and found.rows >= asked,
    )


def _continuous(load: Load, room: Room, options: EngineOptions, row_tokens: int) -> _Engine:
    most = limits(
        room,
        options,
        token_bytes=load.token_bytes,
        context_tokens=load.context_tokens,
        vocabulary=load.vocabulary,
    )
    slots = Slots(
        most.cache_tokens, longest=most.context_tokens, smallest=PAGE_TOKENS if room.cuda else SMALLEST_TOKENS
    )
    cache_tokens, rows = slots.tokens, 0
    if most.context_tokens >= row_tokens:
        while rows < most.rows and slots.take(row_tokens) is not None:
            rows += 1
    return _Engine(most.rows, most.context_tokens, cache_tokens, rows)


def _generate(load: Load, room: Room, options: EngineOptions, row_tokens: int) -> _Engine:
    most = options.max_rows or GENERATE_ROWS
    cache = room.free_bytes // (MEMORY_PARTS * load.token_bytes)
    context = min(filter(None, (options.context_tokens, load.context_tokens)), default=row_tokens)
    return _Engine(most, context, cache, min(most, cache // row_tokens))


def _spare_bytes(load: Load, hardware: Hardware, options: EngineOptions, cache_bytes: int) -> int:
    """What an engine does not touch: of a GPU a fraction, and else a multiple of the cache."""
    if not load.continuous:
        return (hardware.count * MEMORY_PARTS - 1) * cache_bytes
    if hardware.cuda:
        return int(hardware.total_bytes * (1 - (options.memory_fraction or MEMORY_FRACTION)))
    return (CPU_PARTS - 1) * cache_bytes


def _copied_bytes(load: Load, room: Room, options: EngineOptions) -> int:
    if not load.continuous or options.dequantize is Dequantize.NEVER:
        return 0
    spare = load.copy_bytes if options.dequantize is Dequantize.ALWAYS else copy_bytes(room, options)
    return load.copy_bytes if load.copy_bytes <= spare else 0
