"""A plain loop's one pass: takes back expired leases, closes jobs, deletes dead submits, sends wake-ups.

Any number may run at once. A lease is taken back only when it was seen expired twice, half a lease apart on
this process's own clock, so that an outage of the store, in which nobody could renew, reaps nobody.
"""

from __future__ import annotations

from time import monotonic

from jobs.broker import MAX_WAKEUPS, Broker
from jobs.errors import BrokerUnavailable
from jobs.failpoints import failpoint
from jobs.logs import get_logger
from jobs.spec import ModelSpec
from jobs.store import Store

log = get_logger(__name__)


class Reconciler:
    def __init__(self, store: Store, broker: Broker, *, lease_seconds: float) -> None:
        self._store = store
        self._broker = broker
        self._apart_seconds = lease_seconds / 2
        #: {batch id: ((fence, lease_until), first seen on this process's clock)}
        self._sightings: dict[int, tuple[tuple[int, float], float]] = {}

    def repair(self) -> None:
        """One pass. Raises StoreError."""
        reaped = self._reap()
        closed = self._store.closing.close_finished()
        discarded = self._store.loading.discard_expired()
        if reaped or closed or discarded:
            log.info("reconciled", reaped=reaped, closed=closed, discarded=discarded)
        failpoint("reconciler.reaped")

    def send_wakeups(self) -> None:
        """Sends what the queues lack: pending batches of each ModelSpec minus the length of its queue."""
        for spec, batch_ids in self._store.recovery.pending(most=MAX_WAKEUPS).items():
            try:
                self._broker.send_wakeups(ModelSpec.from_canonical(spec).queue, batch_ids)
            except BrokerUnavailable as error:
                log.warning("no wake-ups sent; they follow when Redis is back", error=str(error))
                return

    def _reap(self) -> int:
        now = monotonic()
        expired = self._store.recovery.expired()
        seen = {}
        due = {}
        for batch_id, lease in expired.items():
            before, since = self._sightings.get(batch_id, (lease, now))
            seen[batch_id] = (lease, since if before == lease else now)
            if now - seen[batch_id][1] >= self._apart_seconds:
                due[batch_id] = lease
        self._sightings = seen
        return self._store.recovery.reap(due) if due else 0
