"""What dead processes leave behind: their spools are saved first, then their leases are taken back.

First the spools, since the fences under which they were written end with the leases.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace

import psutil

from jobs.logs import get_logger
from jobs.settings import Settings
from jobs.spec import ECHO, ModelSpec
from jobs.states import RunOutcome
from jobs.store import Store
from jobs.store.lease import Held, Seat
from worker.spool import abandoned, read, spools

log = get_logger(__name__)
#: Where containers may share a host's name, a worker whose process is not seen here has to be silent for so many
#: heartbeats, too, before it counts as dead.
_SILENT_HEARTBEATS = 3
#: A spool that was not written to for so many leases belongs to nobody.
_ABANDONED_LEASES = 1_440
#: A turn saves at most so many outputs of a spool.
_PAGE_OUTPUTS = 2_000


class Leftovers:
    """Every call may be cut short and made again."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        heartbeats = 0 if settings.embedded_store else _SILENT_HEARTBEATS
        self._silent_seconds = heartbeats * settings.heartbeat_seconds

    def settle(self, worker_id: int, generation: int, *, outcome: RunOutcome = RunOutcome.CRASHED) -> int:
        """Saves and takes back what this worker's children up to a generation left: how many leases.

        Raises StoreError; nothing is lost then, and the next call goes on.
        """
        for each, path in spools(self._settings.home, self._settings.database, worker_id, generation=generation):
            seat = Seat(worker_id, each, ModelSpec.parse(ECHO), "", self._settings.lease_seconds)
            lost = frozenset().union(*(self._store.saving.turn(seat, [held]).lost for held in _pages(read(path))))
            log.warning("saved the spool of a dead child", worker=worker_id, generation=each, lost_batches=len(lost))
            path.unlink(missing_ok=True)
        taken = self._store.recovery.take_back(worker_id, generation=generation, outcome=outcome)
        if taken:
            log.warning("took back leases", worker=worker_id, batches=taken, outcome=outcome.value)
        return taken

    def settle_orphans(self) -> int:
        """The same for workers of this host whose parents are gone: how many leases."""
        taken = 0
        for holder in self._store.recovery.holders(socket.gethostname()):
            if not psutil.pid_exists(holder.pid) and holder.seen_seconds >= self._silent_seconds:
                taken += self.settle(holder.worker_id, holder.generation)
        return taken

    def discard_abandoned(self) -> None:
        """Deletes spools whose leases ended long ago: their requests have been, or will be, answered by others."""
        for path in abandoned(self._settings.home, older_than_seconds=_ABANDONED_LEASES * self._settings.lease_seconds):
            log.warning("deleted a spool whose leases have ended", spool=path.name)
            path.unlink(missing_ok=True)


def _pages(helds: list[Held]) -> Iterator[Held]:
    for held in helds:
        for begin in range(0, max(1, len(held.outputs)), _PAGE_OUTPUTS):
            yield replace(held, outputs=held.outputs[begin : begin + _PAGE_OUTPUTS])
