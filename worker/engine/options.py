"""The options of an engine beside the model: sizes, precision and the kind of engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from batchmill.jobs.configuration.settings import Settings


class EngineChoice(StrEnum):
    """The engine that a worker's user asks for; `auto` is the continuous one wherever the model allows it."""

    AUTO = "auto"
    CONTINUOUS = "continuous"
    GENERATE = "generate"


class Dequantize(StrEnum):
    """The choice of a full-precision copy of 4-bit weights for large batches; `auto`: where memory is left for it."""

    AUTO = "auto"
    NEVER = "never"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options of one engine; None leaves the choice to the engine, which decides by the memory that is free."""

    kind: EngineChoice = EngineChoice.AUTO
    #: Requests that the device works on at once.
    max_rows: int | None = None
    #: The most tokens that prompt and answer have together.
    context_tokens: int | None = None
    #: The part of a GPU's memory that weights and cache may take.
    memory_fraction: float | None = None
    #: Bytes that keys and values may take.
    cache_bytes: int | None = None
    #: Copies of 4-bit weights in full precision.
    dequantize: Dequantize = Dequantize.AUTO
    #: An answer does not depend on what else runs.
    deterministic: bool = False

    @classmethod
    def of(cls, settings: Settings) -> EngineOptions:
        """Reads the options from the settings."""
        return cls(
            EngineChoice(settings.engine),
            max_rows=settings.engine_rows,
            context_tokens=settings.context_tokens,
            memory_fraction=settings.gpu_memory_fraction,
            cache_bytes=settings.cache_bytes,
            dequantize=Dequantize(settings.dequantize),
            deterministic=settings.deterministic,
        )
