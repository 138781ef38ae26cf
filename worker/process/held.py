"""A model in its engine, as a child holds it: loaded where its placement says, and what it takes of each device.

Owns the order of loading, adapters and the choice of an engine. It knows no store, no run and no process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.identity import Content, of_echo
from batchmill.jobs.models.spec import ECHO, ModelSpec
from batchmill.worker.devices.placement import Placement
from batchmill.worker.devices.selection import DeviceInfo, use_all_cores
from batchmill.worker.engine import Progress
from batchmill.worker.engine.echo.chaos import ChaosEngine
from batchmill.worker.engine.echo.engine import ECHO_ROWS, EchoEngine
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.registry import Chosen, choose
from batchmill.worker.models.sources import read_on


@dataclass(frozen=True, slots=True)
class Held:
    """`weights_by_device`, `cache_by_device`: bytes on each device, in the placement's order.

    `commit`: what the model's revision resolved to, None for a folder. `adapters`: with their identities.
    `sources`: what model and adapters were loaded from; `at_work`: those that are still read while the model works.
    """

    chosen: Chosen
    identity: str
    adapters: tuple[Adapter, ...] = ()
    load_seconds: float = 0.0
    weights_by_device: tuple[int, ...] = (0,)
    cache_by_device: tuple[int, ...] = (0,)
    commit: str | None = None
    sources: tuple[Content, ...] = ()
    at_work: tuple[Content, ...] = ()


def import_libraries(spec: ModelSpec) -> None:
    """Imports torch and its kin where the model needs them, which takes seconds, so that it can be told of alone."""
    if spec.model != ECHO:
        for name in ("batchmill.worker.models.load", "batchmill.worker.models.adapters.loading"):
            import_module(name)


def hold(
    spec: ModelSpec,
    placement: Placement,
    devices: Sequence[DeviceInfo],
    *,
    adapters: Sequence[Adapter],
    settings: Settings,
    progress: Progress,
    fits: int | None,
) -> Held:
    """Loads the model and puts it into the engine that serves it. Raises ModelError.

    `fits`: what these devices were found to hold, in the engine's unit.
    """
    if spec.model == ECHO:
        kind = ChaosEngine if settings.chaos else EchoEngine
        rows, pace = settings.engine_rows or ECHO_ROWS, settings.echo_step_seconds
        names = [each.name for each in adapters]
        engine = kind(rows=rows, progress=progress, seconds_per_step=pace, fits=fits, adapters=names)
        return Held(Chosen(engine, ECHO), of_echo().identity, tuple(adapters))
    # Imported here, so that the echo engine works where torch is not installed.
    from batchmill.worker.models.adapters.loading import with_adapters
    from batchmill.worker.models.load import load
    from batchmill.worker.plan.refusal import refuse_too_large

    use_all_cores()
    places = [each.torch_device for each in devices]
    options = EngineOptions.of(settings)
    digests = Digests(settings.home, progress=progress)
    fits_at_all = partial(refuse_too_large, options=options)
    loaded = load(spec, places[0], placement=placement, before_weights=fits_at_all, digests=digests)
    loaded = with_adapters(loaded, adapters, digests=digests)
    chosen = choose(loaded, options=options, progress=progress, fits=fits)
    elsewhere = loaded.weights_elsewhere
    sources = (loaded.content, *(each.content for each in loaded.adapters))
    return Held(
        chosen,
        loaded.content.identity,
        tuple(each.adapter for each in loaded.adapters),
        round(loaded.load_seconds, 3),
        (loaded.weights_bytes - sum(elsewhere), *elsewhere),
        tuple(int(part * (chosen.cache_bytes or 0)) for part in loaded.layout.parts(places)),
        loaded.commit,
        sources,
        read_on(sources, from_disk=loaded.layout.on_disk),
    )
