"""The reconciler's pass: takes back expired leases, closes jobs, deletes dead submits, sends wake-ups.

Any number may run at once. A lease, of a batch or of a submit that loads, is taken back only when it was seen expired
twice, half a lease apart on this process's own clock, and was not renewed between. So no lease is reaped for an outage
of the store, in which nobody could renew, nor for a clock that is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from typing import Generic, TypeVar

from batchmill.jobs.broker.client import MAX_WAKEUPS, Broker
from batchmill.jobs.broker.queue_name import queue_name
from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import BrokerUnavailable
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.runtime.failpoints import failpoint
from batchmill.jobs.runtime.logs import get_logger
from batchmill.jobs.store.store import Store

log = get_logger(__name__)
Id = TypeVar("Id", int, str)
Lease = TypeVar("Lease")


class _Sightings(Generic[Id, Lease]):
    """Expired leases, each with the time on this process's clock since which it was seen unchanged."""

    def __init__(self, lease_seconds: float) -> None:
        self._apart_seconds = lease_seconds / 2
        self._seen: dict[Id, tuple[Lease, float]] = {}

    def due(self, expired: Mapping[Id, Lease]) -> dict[Id, Lease]:
        """Returns those that were seen long enough ago, and have not been renewed since."""
        now = monotonic()
        seen = {}
        for each, lease in expired.items():
            before, since = self._seen.get(each, (lease, now))
            seen[each] = (lease, since if before == lease else now)
        self._seen = seen
        return {each: lease for each, (lease, since) in seen.items() if now - since >= self._apart_seconds}


class Reconciler:
    """Repairs the store and fills the queues. `lease_seconds`: of batches; `loading_lease_seconds`: of submits."""

    def __init__(self, store: Store, broker: Broker, *, lease_seconds: float, loading_lease_seconds: float) -> None:
        self._store = store
        self._broker = broker
        self._lease_seconds = lease_seconds
        self._loading_lease_seconds = loading_lease_seconds
        self._batches: _Sightings[int, tuple[int, float]] = _Sightings(lease_seconds)
        self._loads: _Sightings[str, float] = _Sightings(loading_lease_seconds)

    @classmethod
    def of(cls, settings: Settings, store: Store, broker: Broker) -> Reconciler:
        seconds = settings.lease_seconds
        return cls(store, broker, lease_seconds=seconds, loading_lease_seconds=settings.loading_lease_seconds)

    def repair(self) -> None:
        """Runs one pass over the store. Raises StoreError."""
        reaped = self._reap()
        closed = self._store.closing.close_finished()
        discarded = self._discard()
        if reaped or closed or discarded:
            log.info("reconciled", reaped=reaped, closed=closed, discarded=discarded)
        failpoint("reconciler.reaped")

    def send_wakeups(self) -> None:
        """Sends what the queues lack: pending batches of each ModelSpec minus the length of its queue."""
        for spec, batch_ids in self._store.recovery.pending(most=MAX_WAKEUPS).items():
            try:
                self._broker.send_wakeups(queue_name(ModelSpec.from_canonical(spec), self._store.id), batch_ids)
            except BrokerUnavailable as error:
                log.warning("no wake-ups sent; they follow when Redis is back", error=str(error))
                return

    def _reap(self) -> int:
        due = self._batches.due(self._store.recovery.expired(lease_seconds=self._lease_seconds))
        return self._store.recovery.reap(due) if due else 0

    def _discard(self) -> list[str]:
        due = self._loads.due(self._store.creation.expired(lease_seconds=self._loading_lease_seconds))
        return self._store.creation.discard_expired(due) if due else []
