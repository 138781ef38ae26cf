"""The surroundings of the store in random histories: queues, workers with their children, and the database's clock.

Bookkeeping, spool, leftovers and reconciler are the real ones; Redis is a list, and so is an engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sqlalchemy import delete, event, text

from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.models.engine_facts import EngineFacts, EngineLimits
from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.requests.request import RequestKey
from batchmill.jobs.requests.states import BatchState
from batchmill.jobs.store.leases.lease import Lease, WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import metadata, stores
from batchmill.jobs.store.workers.registration import Loaded
from batchmill.worker.loop.holdings import Holdings
from batchmill.worker.loop.pacing import Pacing
from batchmill.worker.loop.spool import Spool, Spools
from batchmill.worker.process.maintenance.leftovers import Leftovers
from batchmill.worker.process.maintenance.reconciler import Reconciler
from tests.support.store import mill

BEAT_SECONDS = 5.0
Key = tuple[str, int]


class Killed(BaseException):
    """The process dies here; no `except Exception` sees it."""


class Queues:
    """Stands in for Redis: keeps wake-ups, in order."""

    def __init__(self) -> None:
        self.waiting: deque[int] = deque()

    def send_wakeups(self, _queue: str, batch_ids: Sequence[int]) -> int:
        missing = batch_ids[: max(0, len(batch_ids) - len(self.waiting))]
        self.waiting.extend(missing)
        return len(missing)


@dataclass(slots=True)
class Child:
    """One process that holds a model: what its saver and its engine know. The engine is a list."""

    session: WorkerSession
    spool: Spool
    rows: int
    holdings: Holdings = field(default_factory=Holdings)
    pacing: Pacing = field(init=False)
    engine: list[tuple[RequestKey, GenerationRequest]] = field(default_factory=list)
    open: bool = True
    away: bool = False
    full: bool = False
    draining: bool = False
    frozen: bool = False

    def __post_init__(self) -> None:
        self.pacing = Pacing(self.rows, self.holdings)

    def room(self) -> tuple[int, int]:
        """The number of requests that the next sync claims, and of those that it may record as in flight."""
        self.pacing.engine_waiting = max(0, len(self.engine) - self.rows)
        return self.pacing.wanted(draining=self.draining), self.pacing.room(draining=self.draining)

    def leases(self) -> dict[int, Lease]:
        held = self.holdings.next_request(room=0, memory=Memory(), release=False).reports
        return {each.lease.batch_id: each.lease for each in held}

    def top_up(self) -> None:
        """The runner takes what is recorded into the engine."""
        while self.holdings.recorded and len(self.engine) < self.rows + self.pacing.fill and not self.full:
            self.engine.append(self.holdings.recorded.popleft())

    def forget(self, keys: Sequence[RequestKey]) -> None:
        gone = set(keys)
        self.engine = [each for each in self.engine if each[0] not in gone]


class Desk:
    """One worker: its row in the store, its parent, and its child if one lives."""

    def __init__(
        self, store: Store, bed: Bed, queues: Queues, rows: int, number: int, adapters: tuple[Adapter, ...] = ()
    ) -> None:
        self.store = store
        self.bed = bed
        self.rows = rows
        self.adapters = adapters
        self.worker_id = store.registration.register(
            host="host",
            name=f"w{number}",
            pid=number,
            spec=mill.ECHO_SPEC,
            device="cpu",
            only_job=None,
            beat=BEAT_SECONDS,
            adapters=adapters,
        )
        self.reconciler = Reconciler(
            store,
            queues,  # type: ignore[arg-type]
            lease_seconds=mill.LEASE_SECONDS,
            loading_lease_seconds=mill.LEASE_SECONDS,
        )
        self.leftovers = Leftovers(store, bed.settings)  # type: ignore[arg-type]
        self.generation = 0
        #: The newest generation that is dead, until the parent has settled what it left.
        self.unsettled: int | None = None
        self.child: Child | None = None
        self.spawn()

    def spawn(self) -> None:
        self.generation = self.store.registration.new_generation(self.worker_id, child_pid=self.generation + 1)
        loaded = Loaded(EngineFacts(EngineLimits("echo", self.rows), mill.IDENTITY), "cpu", None, {})
        self.store.registration.loaded(self.worker_id, self.generation, loaded=loaded)
        spec, seconds = mill.ECHO_SPEC, mill.LEASE_SECONDS
        session = WorkerSession(
            self.worker_id, self.generation, spec, "cpu", seconds, mill.IDENTITY, adapters=self.adapters
        )
        spools = Spools(self.bed.folder, self.store.id, database=self.bed.settings.database)
        path = spools.path(self.worker_id, self.generation)
        self.child = Child(session, Spool(path, limit_bytes=self.bed.spool_bytes), self.rows)

    def settle(self) -> None:
        if self.unsettled is not None:
            self.leftovers.settle(self.worker_id, self.unsettled)
            self.unsettled = None


class Bed:
    """One migrated database that all histories of a test share, each on empty tables, with the clock it reads."""

    def __init__(self, url: str, folder: Path) -> None:
        self.clock = mill.Clock()
        self.own_clock = mill.Clock(0.0)
        self.store = Store(url, now=self.clock.expression())
        self.folder = folder
        self.settings = SimpleNamespace(
            home=folder,
            database=url,
            lease_seconds=mill.LEASE_SECONDS,
            embedded_store=True,
            heartbeat_seconds=BEAT_SECONDS,
        )
        self.spool_bytes = 1_000_000
        if self.store.database.is_sqlite:  # no power is cut here, so nothing has to reach the disk
            event.listen(self.store.database._engine, "connect", _without_syncs)

    def empty(self) -> None:
        with self.store.database.write() as connection:
            tables = [table for table in reversed(metadata.sorted_tables) if table is not stores]
            if self.store.database.is_sqlite:
                for table in tables:
                    connection.execute(delete(table))
            else:
                names = ", ".join(table.name for table in tables)
                connection.execute(text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))
        for path in self.folder.glob("spool/*"):
            path.unlink()
        self.clock.seconds, self.own_clock.seconds = 1_000_000.0, 0.0


def _without_syncs(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("PRAGMA journal_mode=MEMORY")


@dataclass(frozen=True, slots=True)
class Seen:
    """All rows at one moment."""

    jobs: dict[str, Any]
    batches: dict[int, Any]
    requests: dict[Key, int]
    outputs: dict[Key, Any]
    runs: dict[int, Any]

    def batch_of(self, key: Key) -> Any:
        return self.batches[self.requests[key]]

    def holds(self, lease: Lease) -> bool:
        """True where a lease's fence still holds."""
        batch = self.batches[lease.batch_id]
        return batch.state == BatchState.LEASED.value and batch.fence == lease.fence
