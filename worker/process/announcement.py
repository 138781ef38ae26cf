"""A child's account of itself once its engine is open: in its worker's row, in its session and in the log."""

from __future__ import annotations

from collections.abc import Sequence

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.models.engine_facts import EngineFacts
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.runtime.logs import get_logger
from batchmill.jobs.store.leases.lease import WorkerSession
from batchmill.jobs.store.workers.registration import Loaded
from batchmill.worker.devices.placement import TOGETHER
from batchmill.worker.devices.selection import DeviceInfo
from batchmill.worker.engine import OpenEngine
from batchmill.worker.process.order import ChildOrder
from batchmill.worker.process.versions import versions

log = get_logger(__name__)


def uuid_of(devices: Sequence[DeviceInfo]) -> str | None:
    """The UUIDs of these devices together; None where they have none."""
    return TOGETHER.join(each.uuid for each in devices if each.uuid is not None) or None


def session_of(
    order: ChildOrder, generation: int, settings: Settings, opened: OpenEngine, devices: Sequence[DeviceInfo]
) -> WorkerSession:
    """The session from which it asks the store for work."""
    facts = opened.facts
    return WorkerSession(
        order.worker_id,
        generation,
        ModelSpec.from_canonical(order.spec),
        TOGETHER.join(each.torch_device for each in devices),
        settings.lease_seconds,
        facts.identity,
        model_load_seconds=facts.load_seconds,
        model_commit=facts.commit,
        device_uuid=uuid_of(devices),
        defaults=opened.engine.defaults,
        versions=versions(),
        only_job=order.only_job,
        adapters=facts.adapters,
        kinds=facts.kinds,
    )


def loaded_of(facts: EngineFacts, devices: Sequence[DeviceInfo], memory: Memory) -> Loaded:
    """The account for its worker's row."""
    name = TOGETHER.join(dict.fromkeys(each.name for each in devices))
    return Loaded(facts, name, uuid_of(devices), versions(), memory.devices)


def say_ready(order: ChildOrder, loaded: Loaded, torch_seconds: float) -> None:
    """The log line of a child that is ready for work."""
    facts, limits = loaded.facts, loaded.facts.limits
    log.info(
        "ready",
        worker=order.worker_id,
        model=str(ModelSpec.from_canonical(order.spec)),
        device=loaded.device_name,
        torch_seconds=round(torch_seconds, 3),
        load_seconds=facts.load_seconds,
        engine=limits.kind,
        rows=limits.rows,
        context_tokens=limits.context_tokens,
        cache_tokens=limits.cache_tokens,
    )
