"""The child's sync with the store: a thread that claims, records what is in flight, saves and finishes.

It commits at least every `save_seconds`, and at once when the engine needs more. While the store is away, outputs and
the list of what is in flight go to the spool instead, and the engine goes on with what is claimed. The runner calls
`take` and `give`, and never touches the database; the saver never touches the engine.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from time import monotonic

from batchmill.jobs.errors import StoreError
from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.requests.request import Output, Request, RequestKey
from batchmill.jobs.runtime.failpoints import failpoint
from batchmill.jobs.runtime.logs import get_logger
from batchmill.jobs.store.leases.lease import SyncResult, WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.worker.loop.batch_lines import log_batches
from batchmill.worker.loop.holdings import Holdings, SyncRequest
from batchmill.worker.loop.pacing import Pacing
from batchmill.worker.loop.spool import Spool

log = get_logger(__name__)
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0
_PAUSES_A_LEASE = 12
#: The interval at which the worker's row gets the memory of its devices, while it works.
_DEVICES_SECONDS = 5.0
#: The number of times that the tokens of unfinished answers are counted between two saves.
_COUNTS_A_SAVE = 4


@dataclass(frozen=True, slots=True)
class EngineInput:
    """The next input of the engine."""

    add: tuple[tuple[RequestKey, Request], ...]
    #: Requests to cancel.
    forget: tuple[RequestKey, ...]


class Saver:
    """Syncs with the store for the life of a child; idle between two tasks.

    `rows`: the engine's rows.
    `admission_order`: the engine's, which knows what is best added beside what.
    `peak`: returns the peak memory since its last call.
    `wake`: tells other workers that batches became pending.
    `drain`: once set, everything is saved or handed back, and no more is claimed.
    `capacity_of`: the device as `store.health` knows it.
    `may_begin`: true while jobs that nobody has begun may be claimed.
    """

    def __init__(
        self,
        store: Store,
        session: WorkerSession,
        *,
        rows: int,
        admission_order: Callable[[Sequence[Request]], Sequence[Request]],
        save_seconds: float,
        peak: Callable[[], Memory],
        wake: Callable[[], None],
        drain: threading.Event,
        spool: Spool,
        capacity_of: str,
        may_begin: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store = store
        self._session = session
        self._spool = spool
        self._device = capacity_of
        self._may_begin = may_begin
        self._save_seconds = save_seconds
        self._peak = peak
        self._wake = wake
        self._drain = drain
        self._condition = threading.Condition()
        self._holdings = Holdings(admission_order)
        self._pacing = Pacing(rows, self._holdings)
        self._forget: list[RequestKey] = []
        self._open = False
        self._syncs = 0
        self._count_at = 0.0
        self._pause = _FIRST_PAUSE_SECONDS
        #: Well below half a lease, after which others may take back what was not renewed.
        self._longest_pause = min(_LONGEST_PAUSE_SECONDS, session.lease_seconds / _PAUSES_A_LEASE)
        self._try_at = 0.0
        self._memory = Memory()
        self._memory_kept_at = 0.0
        self._known_capacity: int | None = None
        self._capacity_kept: int | None = None
        self._thread = threading.Thread(target=self._run, name="saver", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def open(self) -> None:
        """Begins a task: the saver claims."""
        with self._condition:
            self._open, self._pacing.dry = True, False
            self._condition.notify_all()

    def take(self, *, waiting: int, active: int) -> EngineInput | None:
        """Takes the next input of an engine that has so many waiting and active; None when the task is over.

        Blocks while the engine is empty and there may be more; once the task is over, all is saved. An idle device
        waits for the sync that fills the engine's queue, since it works best on a full one.
        """
        with self._condition:
            self._pacing.engine_waiting = waiting
            self._pacing.engine_empty = waiting + active == 0
            if active == 0 and self._is_urgent():
                syncs = self._syncs
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._syncs != syncs, timeout=self._save_seconds)
            while True:
                if self._is_urgent():
                    self._condition.notify_all()
                if self._drain.is_set():
                    self._hand_back()
                    return None
                if not self._pacing.full and (self._holdings.recorded or self._forget or not self._pacing.engine_empty):
                    return self._next()
                if not self._open:
                    return None
                self._condition.wait(self._save_seconds)

    def give(
        self,
        outputs: Sequence[Output],
        *,
        known_capacity: int | None = None,
        tokens: Callable[[], Mapping[RequestKey, int]] | None = None,
    ) -> None:
        """Gives outputs that the engine finished, to be saved, and what its device was found to hold.

        `tokens`: counts what the engine has answered so far of the rest; it takes time, so it is called now and then.
        """
        counted = None
        if tokens is not None and monotonic() >= self._count_at:
            counted = tokens()
            self._count_at = monotonic() + self._save_seconds / _COUNTS_A_SAVE
        with self._condition:
            self._holdings.answer(outputs)
            self._known_capacity = known_capacity
            if counted is not None:
                self._holdings.tokens = counted

    def _next(self) -> EngineInput:
        """Takes as many recorded requests as fill the engine's own queue."""
        count = self._pacing.entering
        work = EngineInput(
            tuple(self._holdings.recorded.popleft() for _ in range(count)),
            tuple(self._forget),
        )
        self._forget.clear()
        self._pacing.engine_waiting += count
        self._pacing.engine_empty = self._pacing.engine_empty and not count
        return work

    def _hand_back(self) -> None:
        """Waits, inside the lock, until the last sync has saved and released everything."""
        self._pacing.engine_empty = True
        while self._open:
            self._condition.notify_all()
            self._condition.wait(self._save_seconds)

    def _is_urgent(self) -> bool:
        return self._pacing.is_urgent(draining=self._drain.is_set())

    # --- the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._turn()
        except StoreError as error:
            log.error("this process ends, since its store cannot be used", error=str(error))
            os._exit(1)
        except Exception:
            log.exception("the saver failed; this process ends, and its batches are taken back")
            os._exit(1)

    def _turn(self) -> None:
        due = monotonic() + self._save_seconds
        with self._condition:
            while not self._open or not (self._is_urgent() or monotonic() >= due):
                self._condition.wait(max(0.0, due - monotonic()) if self._open else None)
            release = self._drain.is_set()
            room = self._pacing.room(draining=release)
            memory = self._peak()
            request = self._holdings.next_request(room=room, memory=memory, release=release)
            page = request.first_page()
            wanted = 0 if page.more else self._pacing.wanted(draining=release)
        result = None
        if monotonic() >= self._try_at:
            result = self._commit(page, wanted, room - sum(request.entering.values()))
        if result is None:
            self._outlive(request)
            return
        if page.more:
            self._spool.saved(page.reports)
        else:
            self._spool.clear()
        with self._condition:
            self._pacing.away = self._pacing.full = False
            self._pacing.more = page.more
            self._absorb(page, result, wanted)
            self._syncs += 1
            self._condition.notify_all()
        failpoint("turn.committed")
        log_batches(page.reports, result, worker_id=self._session.worker_id)
        if result.released:
            self._wake()
        self._keep_capacity()
        self._keep_devices(memory)

    def _commit(self, request: SyncRequest, wanted: int, room: int) -> SyncResult | None:
        """Syncs with the store; None when it is away. The request stays true, so it is sent again later."""
        session = self._session if not wanted or self._may_begin() else replace(self._session, may_begin=False)
        try:
            result = self._store.leases.sync(
                session, request.reports, wanted_requests=wanted, in_flight_room=room, resumed=self._pacing.away
            )
        except StoreError as error:
            if not error.retryable:
                self._spool.append(request.reports)
                raise
            log.warning(
                f"{error.hindrance}; outputs wait in the spool", error=str(error), worker=self._session.worker_id
            )
            self._try_at = monotonic() + self._pause
            self._pause = min(2 * self._pause, self._longest_pause)
            return None
        if self._pacing.away:
            log.info("the store is back", worker=self._session.worker_id)
        self._pause, self._try_at = _FIRST_PAUSE_SECONDS, 0.0
        return result

    def _outlive(self, request: SyncRequest) -> None:
        """Puts into the spool what the store does not take; what it then knows to be in flight may enter the engine."""
        spooled = self._spool.append(request.reports)
        with self._condition:
            self._pacing.away, self._pacing.full, self._pacing.dry = True, not spooled, True
            if spooled:
                self._holdings.enter(request)
            self._syncs += 1
            self._condition.notify_all()

    def _keep_capacity(self) -> None:
        """Stores what the device holds for the next process; if the store is away now, a later sync does."""
        with self._condition:
            known_capacity = self._known_capacity
        if known_capacity is not None and known_capacity != self._capacity_kept:
            with suppress(StoreError):
                self._store.health.remember_capacity(self._session.spec, self._device, known_capacity)
                self._capacity_kept = known_capacity

    def _keep_devices(self, memory: Memory) -> None:
        """Stores in the worker's row the peak of its devices so far, and what all processes hold there now."""
        used = {each.key: each.device_used_bytes for each in memory.devices}
        self._memory = self._memory.and_then(memory)
        if not self._memory.devices or (monotonic() < self._memory_kept_at + _DEVICES_SECONDS and self._open):
            return
        devices = [replace(each, device_used_bytes=used[each.key]) for each in self._memory.devices]
        with suppress(StoreError):
            self._store.registration.measured(self._session.worker_id, self._session.generation, devices=devices)
            self._memory_kept_at = monotonic()

    def _absorb(self, request: SyncRequest, result: SyncResult, wanted: int) -> None:
        self._forget += self._holdings.absorb(request, result)
        if result.drain:
            self._drain.set()
        self._pacing.dry = wanted > 0 and not result.claimed
        if not self._holdings and not result.claimed and (self._drain.is_set() or self._pacing.dry):
            self._open = False
