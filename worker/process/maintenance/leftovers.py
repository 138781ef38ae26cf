"""The leftovers of dead processes: their spools are saved first, then their leases are taken back.

The spools come first, since the fences under which they were written end with the leases.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.models.spec import ECHO, ModelSpec
from batchmill.jobs.requests.states import RunOutcome
from batchmill.jobs.runtime.logs import get_logger
from batchmill.jobs.runtime.process.process import Lives, Process
from batchmill.jobs.store.bounds import cut
from batchmill.jobs.store.leases.lease import BatchReport, WorkerSession
from batchmill.jobs.store.leases.recovery import Holder
from batchmill.jobs.store.store import Store
from batchmill.worker.loop.batch_lines import log_taken_back
from batchmill.worker.loop.spool import NewerSpool, SpoolFile, Spools, abandoned, read

log = get_logger(__name__)
#: Heartbeats that a worker of an earlier boot has to be silent for as well, before it counts as dead: it may run on
#: another machine of this name.
_SILENT_HEARTBEATS = 3
#: A spool that was not written to for this many leases belongs to nobody.
_ABANDONED_LEASES = 1_440
#: The most outputs of a spool in one sync, beside the bound of their bytes.
_PAGE_OUTPUTS = 2_000


class Leftovers:
    """Settles what dead children left; every call may be cut short and made again."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._silent_seconds = _SILENT_HEARTBEATS * settings.heartbeat_seconds

    def settle(self, worker_id: int, generation: int, *, outcome: RunOutcome = RunOutcome.CRASHED) -> int:
        """Saves and takes back what this worker's children up to a generation left. Returns the number of leases.

        Raises StoreError; nothing is lost then, and the next call goes on.
        """
        for each in self._spools.left_by(worker_id, generation=generation):
            self._save(each)
        held = self._store.recovery.held_by(worker_id, generation=generation)
        taken = self._store.recovery.take_back(worker_id, generation=generation, outcome=outcome)
        log_taken_back(held, worker_id=worker_id, outcome=outcome)
        return taken

    def settle_orphans(self) -> int:
        """Settles workers of this host whose parents are known to be dead. Returns the number of leases.

        Of silent workers of which nothing is known (of another container, or from before a process was told by more
        than its pid) only the spools are saved, while the leases last; these end by the store's clock.
        """
        taken = 0
        for holder in self._store.recovery.holders(socket.gethostname()):
            if self._is_dead(holder):
                taken += self.settle(holder.worker_id, holder.generation)
        if spools := self._spools.found():
            silent = self._store.recovery.silent({each.worker_id for each in spools})
            for each in spools:
                if each.worker_id in silent and not _lives(silent[each.worker_id]):
                    self._save(each)
        return taken

    @property
    def _spools(self) -> Spools:
        return Spools(self._settings.home, self._store.id, database=self._settings.database)

    def _save(self, spool: SpoolFile) -> None:
        """Saves a spool under its fences, as far as they hold, and removes it."""
        session = WorkerSession(
            spool.worker_id, spool.generation, ModelSpec.parse(ECHO), "", self._settings.lease_seconds, identity=""
        )
        told = {"worker": spool.worker_id, "generation": spool.generation}
        try:
            reports = read(spool.path)
        except FileNotFoundError:
            return  # another worker of this home was quicker
        except NewerSpool:
            log.warning("a spool of a newer batchmill is left to it", spool=spool.path.name, **told)
            return
        lost = frozenset().union(*(self._store.leases.sync(session, [page]).lost for page in _pages(reports)))
        log.warning("saved the spool of a child that is gone or silent", lost_batches=len(lost), **told)
        spool.path.unlink(missing_ok=True)

    def _is_dead(self, holder: Holder) -> bool:
        process = holder.process
        if process is None or process.lives() is not Lives.NO:
            return False  # nothing is known of it, so that its leases end by the store's clock
        return process.is_of_this_boot or holder.seen_seconds >= self._silent_seconds

    def discard_abandoned(self) -> None:
        """Deletes spools whose leases ended long ago: their requests have been, or will be, answered by others."""
        for path in abandoned(self._settings.home, older_than_seconds=_ABANDONED_LEASES * self._settings.lease_seconds):
            log.warning("deleted a spool whose leases have ended", spool=path.name)
            path.unlink(missing_ok=True)


def _lives(process: Process | None) -> bool:
    return process is not None and process.lives() is Lives.YES


def _pages(reports: list[BatchReport]) -> Iterator[BatchReport]:
    for report in reports:
        begin = 0
        for count in cut((each.size_bytes for each in report.outputs), most=_PAGE_OUTPUTS):
            yield replace(report, outputs=report.outputs[begin : begin + count])
            begin += count
