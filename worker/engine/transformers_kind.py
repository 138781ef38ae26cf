"""Opens a transformers model in the engine that its user asks for, as far as the model allows it.

Owns the order of loading and adapters, the choice of an engine, the fallback from the continuous engine to generate,
and the options that generate lacks. A model's name decides nothing.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.engine_facts import EngineFacts
from batchmill.jobs.runtime.logs import get_logger
from batchmill.worker.devices.selection import use_all_cores
from batchmill.worker.engine import Engine, OpenEngine, Opening, Progress
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.continuous.support import Unsupported
from batchmill.worker.engine.generate.engine import GenerateEngine
from batchmill.worker.engine.options import Dequantize, EngineChoice, EngineOptions
from batchmill.worker.models.adapters.loading import with_adapters
from batchmill.worker.models.load import LoadedModel, load
from batchmill.worker.models.sources import read_on

log = get_logger(__name__)


class TransformersKind:
    """The continuous and the generate engine, and `auto`, which is the first of them that serves the model."""

    def open(self, opening: Opening) -> OpenEngine:
        """Loads the model and its adapters, and puts them into an engine. Raises ModelError."""
        use_all_cores()
        loaded = load(
            opening.spec,
            opening.devices[0],
            placement=opening.placement,
            before_weights=opening.before_weights,
            digests=opening.digests,
        )
        loaded = with_adapters(loaded, opening.adapters, digests=opening.digests)
        engine = serve(
            loaded, options=opening.options, progress=opening.progress, known_capacity=opening.known_capacity
        )
        sources = (loaded.content, *(each.content for each in loaded.adapters))
        elsewhere = loaded.weights_elsewhere
        facts = EngineFacts(
            engine.limits,
            loaded.content.identity,
            loaded.commit,
            tuple(each.adapter for each in loaded.adapters),
            round(loaded.load_seconds, 3),
            (loaded.weights_bytes - sum(elsewhere), *elsewhere),
            tuple(int(part * engine.cache_bytes) for part in loaded.layout.parts(opening.devices)),
            engine.kinds,
        )
        return OpenEngine(engine, facts, sources, read_on(sources, from_disk=loaded.layout.on_disk))


def serve(
    loaded: LoadedModel,
    *,
    options: EngineOptions,
    progress: Progress = lambda: False,
    known_capacity: int | None = None,
) -> Engine:
    """Puts a loaded model into the engine that serves it.

    Raises ModelError when the model, or the generate engine in place of the continuous one, cannot do what is asked.
    """
    if options.context_tokens is not None:
        limit = min(options.context_tokens, loaded.context_tokens or options.context_tokens)
        loaded, options = replace(loaded, context_tokens=limit), replace(options, context_tokens=limit)
    if options.kind is EngineChoice.GENERATE:
        return _generate(loaded, options, progress, known_capacity, reason="--engine generate was asked for")
    try:
        engine = ContinuousEngine(loaded, options=options, progress=progress, known_capacity=known_capacity)
    except Unsupported as error:
        if options.kind is EngineChoice.CONTINUOUS:
            raise ModelError(
                f"the continuous engine cannot serve {loaded.spec}: {error}; --engine auto serves it by generate"
            ) from error
        reason = str(error)
    else:
        log.info("the weights are laid out", **asdict(engine.prepared))
        return engine
    log.warning("the continuous engine cannot serve this model, so generate does", because=reason)
    reason = f"the continuous engine cannot serve it: {reason}"
    return _generate(loaded, options, progress, known_capacity, reason=reason)


def _generate(
    loaded: LoadedModel, options: EngineOptions, progress: Progress, known_capacity: int | None, *, reason: str
) -> Engine:
    """Makes a generate engine; `reason`: why it is not the continuous one."""
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
    return GenerateEngine(loaded, options=options, progress=progress, known_capacity=known_capacity)
