"""Which engine serves a loaded model: what its user asks for, and what the model allows; never its name.

Owns the way back to the generate engine, and what becomes of the options that this one lacks. It imports an engine,
and with it torch, when one is chosen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from batchmill.jobs.errors import ModelError
from batchmill.jobs.runtime.logs import get_logger
from batchmill.worker.engine import Engine, Progress
from batchmill.worker.engine.options import Dequantize, EngineKind, EngineOptions

if TYPE_CHECKING:
    from batchmill.worker.models.load import LoadedModel

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Chosen:
    """An engine and its limits, as they are shown to people; `engine.rows` is the third.

    `context_tokens`: prompt and answer together, None for no limit. `cache_tokens`: what its KV cache holds at once,
    None for an engine that has none. `cache_bytes`: what keys and values take, or may take, then.
    """

    engine: Engine
    kind: str
    context_tokens: int | None = None
    cache_tokens: int | None = None
    cache_bytes: int | None = None


def choose(loaded: LoadedModel, *, options: EngineOptions, progress: Progress, fits: int | None) -> Chosen:
    """The engine that serves this model. `fits`: what its device was found to hold, in the engine's unit.

    Raises ModelError when the model, or the generate engine in its place, cannot do what is asked.
    """
    if options.context_tokens is not None:
        most = min(options.context_tokens, loaded.context_tokens or options.context_tokens)
        loaded, options = replace(loaded, context_tokens=most), replace(options, context_tokens=most)
    if options.kind is EngineKind.GENERATE:
        return _generate(loaded, options, progress, fits, reason="--engine generate was asked for")
    from batchmill.worker.engine.continuous.engine import ContinuousEngine, Unsupported

    try:
        engine = ContinuousEngine(loaded, options=options, progress=progress, fits=fits)
    except Unsupported as error:
        if options.kind is EngineKind.CONTINUOUS:
            raise ModelError(
                f"the continuous engine cannot serve {loaded.spec}: {error}; --engine auto serves it by generate"
            ) from error
        reason = str(error)
    else:
        log.info("the weights are laid out", **asdict(engine.prepared))
        return Chosen(
            engine, EngineKind.CONTINUOUS.value, engine.context_tokens, engine.cache_tokens, engine.cache_bytes
        )
    log.warning("the continuous engine cannot serve this model, so generate does", because=reason)
    return _generate(loaded, options, progress, fits, reason=f"the continuous engine cannot serve it: {reason}")


def _generate(
    loaded: LoadedModel, options: EngineOptions, progress: Progress, fits: int | None, *, reason: str
) -> Chosen:
    """The generate engine; `reason` says why not the continuous one."""
    import torch

    from batchmill.worker.engine.generate.engine import GENERATE_ROWS, GenerateEngine

    if options.deterministic:
        raise ModelError(
            f"--deterministic needs the continuous engine, and {loaded.spec} gets the generate engine ({reason}): "
            "its answers depend on what else runs"
        )
    if options.dequantize is Dequantize.ALWAYS:
        log.warning("the generate engine makes no copies of weights: --dequantize always changes nothing")
    if options.cache_bytes is not None:
        log.warning("the generate engine allocates no cache at start: cache_bytes changes nothing")
    if options.memory_fraction is not None and loaded.device.type == "cuda":
        for place in range(torch.cuda.device_count()):  # a worker sees its own devices alone
            torch.cuda.set_per_process_memory_fraction(options.memory_fraction, place)
    engine = GenerateEngine(loaded, rows=options.max_rows or GENERATE_ROWS, progress=progress, fits=fits)
    tokens = engine.capacity.limit
    kind = EngineKind.GENERATE.value
    return Chosen(engine, kind, loaded.context_tokens, tokens, tokens * loaded.cache_token_bytes)
