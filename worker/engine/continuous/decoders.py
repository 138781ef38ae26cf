"""Opens a decoder with the best attention backend that passes its trial on this device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchmill.jobs.errors import BatchmillError
from batchmill.jobs.models.engine_facts import EngineLimits
from batchmill.jobs.runtime.logs import get_logger
from batchmill.worker.devices.selection import is_out_of_memory
from batchmill.worker.engine.continuous.attention.backends import AttentionBackend, StepBounds, qualified
from batchmill.worker.engine.continuous.attention.cache import CacheShape
from batchmill.worker.engine.continuous.execution.decoder import Decoder
from batchmill.worker.engine.continuous.scheduling.slots import Slots
from batchmill.worker.engine.continuous.sizing import size
from batchmill.worker.engine.continuous.support import Unsupported
from batchmill.worker.engine.lora import Lora
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.sizing import Load, MemoryBudget
from batchmill.worker.models.load import LoadedModel

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OpenDecoder:
    """A decoder that has passed its trial, with the size that its backend allows."""

    decoder: Decoder
    slots: Slots
    limits: EngineLimits
    step_tokens: int
    backend: AttentionBackend


def open_decoder(
    loaded: LoadedModel,
    shape: CacheShape,
    load: Load,
    options: EngineOptions,
    *,
    lora: Lora,
    step_tokens: int | None = None,
) -> OpenDecoder:
    """Tries the backends one after the other. `step_tokens`: those of one step, in place of the device's.

    Raises Unsupported where none passes, with what the last one lacks.
    """
    *others, last = qualified(shape, loaded.device)
    for backend in others:
        try:
            return _opened(loaded, shape, load, options, backend, lora=lora, step_tokens=step_tokens)
        except Unsupported as error:
            because = str(error)
        log.warning(
            "an attention backend failed its trial, so the next is tried", backend=backend.name, because=because
        )
        if loaded.device.type == "cuda":
            torch.cuda.empty_cache()  # else the next cache is sized by what this one left
    return _opened(loaded, shape, load, options, last, lora=lora, step_tokens=step_tokens)


def _opened(
    loaded: LoadedModel,
    shape: CacheShape,
    load: Load,
    options: EngineOptions,
    backend: AttentionBackend,
    *,
    lora: Lora,
    step_tokens: int | None,
) -> OpenDecoder:
    planned = size(load, MemoryBudget.of(loaded.device), options, pages=backend.pages)
    slots = planned.slots()
    bounds = StepBounds(
        planned.limits.rows, max(step_tokens or planned.step_tokens, planned.limits.rows), slots.longest
    )
    try:
        decoder = Decoder(loaded, shape, slots, backend, bounds, lora=lora, fixed=options.deterministic)
    except (Unsupported, BatchmillError):
        raise
    except Exception as error:  # a kernel that does not run on a device may raise anything
        if is_out_of_memory(error):
            raise
        raise Unsupported(f"{type(error).__name__}: {error}") from error
    return OpenDecoder(decoder, slots, planned.limits, bounds.tokens, backend)
