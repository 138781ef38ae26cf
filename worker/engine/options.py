"""What a worker's user asks of its engine, beside the model: sizes, precision and the kind of engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from batchmill.jobs.configuration.settings import Settings


class EngineKind(StrEnum):
    """Which engine serves a model; `auto` is the continuous one wherever the model allows it."""

    AUTO = "auto"
    CONTINUOUS = "continuous"
    GENERATE = "generate"


class Dequantize(StrEnum):
    """Whether 4-bit weights get a copy of full precision for large batches; `auto`: where memory is left for it."""

    AUTO = "auto"
    NEVER = "never"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """None leaves the choice to the engine, which decides by the memory that is free.

    `max_rows`: requests that the device works on at once. `context_tokens`: the most that prompt and answer have
    together. `memory_fraction`: the part of a GPU's memory that weights and cache may take. `cache_bytes`: what keys
    and values may take. `deterministic`: an answer does not depend on what else runs.
    """

    kind: EngineKind = EngineKind.AUTO
    max_rows: int | None = None
    context_tokens: int | None = None
    memory_fraction: float | None = None
    cache_bytes: int | None = None
    dequantize: Dequantize = Dequantize.AUTO
    deterministic: bool = False

    @classmethod
    def of(cls, settings: Settings) -> EngineOptions:
        """What the settings ask for."""
        return cls(
            EngineKind(settings.engine),
            max_rows=settings.engine_rows,
            context_tokens=settings.context_tokens,
            memory_fraction=settings.gpu_memory_fraction,
            cache_bytes=settings.cache_bytes,
            dequantize=Dequantize(settings.dequantize),
            deterministic=settings.deterministic,
        )
