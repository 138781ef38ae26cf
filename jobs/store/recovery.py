"""Taking leases back from who died, and knowing what is pending: the reconciler's side of the store."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, select, update

from jobs.adapters import Adapter, from_json
from jobs.failpoints import failpoint
from jobs.spec import ModelSpec
from jobs.states import (
    BATCH_BEFORE,
    CLAIMABLE_JOB_STATES,
    HOLDING_JOB_STATES,
    BatchState,
    JobState,
    RunOutcome,
)
from jobs.store.blame import Blaming
from jobs.store.closing import Closing
from jobs.store.database import Database
from jobs.store.lease import NO_LEASE, end_runs
from jobs.store.pending import needs_met, pending_batches
from jobs.store.workers import alive
from jobs.tables import batches, jobs, runs, workers

#: How many batches one transaction takes back.
_PAGE = 500


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker that holds leases: its process, its children so far, and when it was last heard of."""

    worker_id: int
    pid: int
    generation: int
    seen_seconds: float


class Recovery:
    """Every call is safe at any time, twice, and from several processes at once."""

    def __init__(self, database: Database, closing: Closing) -> None:
        self._database = database
        self._closing = closing
        self._blaming = Blaming(database)

    def take_back(self, worker_id: int, *, generation: int, outcome: RunOutcome = RunOutcome.CRASHED) -> int:
        """Takes back every lease of this worker's children up to a generation: how many there were.

        After a crash what was in flight is blamed (`jobs.store.blame`); what was released is not.
        """
        whose = and_(batches.c.worker_id == worker_id, batches.c.worker_generation <= generation)
        taken = page = self._take_page(whose, outcome)
        while page == _PAGE:
            page = self._take_page(whose, outcome)
            taken += page
        return taken

    def holders(self, host: str) -> list[Holder]:
        """The workers of a host that hold leases."""
        with self._database.read() as connection:
            found = connection.execute(
                select(
                    workers.c.id,
                    workers.c.pid,
                    workers.c.generation,
                    (self._database.now - workers.c.heartbeat_at).label("seen_seconds"),
                )
                .where(workers.c.host == host, workers.c.id.in_(select(batches.c.worker_id).distinct()))
                .order_by(workers.c.id)
            ).all()
        return [Holder(row.id, row.pid, row.generation, row.seen_seconds) for row in found]

    def expired(
        self, *, for_seconds: float = 0.0, of_jobs: Collection[JobState] = HOLDING_JOB_STATES
    ) -> dict[int, tuple[int, float]]:
        """Batches whose lease expired at least so long ago: {batch id: (fence, lease_until)}."""
        with self._database.read() as connection:
            found = connection.execute(
                select(batches.c.id, batches.c.fence, batches.c.lease_until)
                .select_from(jobs.join(batches, batches.c.job_id == jobs.c.id))
                .where(jobs.c.state.in_(of_jobs))
                .where(batches.c.state == BatchState.LEASED.value)
                .where(batches.c.lease_until < self._database.now - for_seconds)
            ).all()
        return {row.id: (row.fence, row.lease_until) for row in found}

    def reap(self, leases: Mapping[int, tuple[int, float]]) -> int:
        """Takes back these leases, as `expired` gave them, unless they were renewed since: how many."""
        reaped = 0
        for batch_id, (fence, lease_until) in sorted(leases.items()):
            same = and_(batches.c.id == batch_id, batches.c.fence == fence, batches.c.lease_until == lease_until)
            reaped += self._take_page(same, RunOutcome.EXPIRED)
        return reaped

    def pending(self, *, most: int) -> dict[str, list[int]]:
        """The pending batches of open jobs, by canonical spec: at most `most` ids for each.

        Of those that need an adapter only what a live worker could take: a wake-up for the rest would be for nothing.
        """
        with self._database.read() as connection:
            specs = connection.scalars(
                select(jobs.c.spec).where(jobs.c.state.in_(CLAIMABLE_JOB_STATES)).distinct()
            ).all()
            found = {spec: self._pending(connection, spec, self._held(connection, spec), most) for spec in specs}
        return {spec: ids for spec, ids in found.items() if ids}

    def pending_of(self, spec: ModelSpec, *, most: int, adapters: Iterable[Adapter] | None = None) -> list[int]:
        """The pending batches of one spec, oldest job first.

        Of those that need an adapter what a worker that holds `adapters` could take, or where None any live worker.
        """
        with self._database.read() as connection:
            held = self._held(connection, spec.canonical) if adapters is None else set(adapters)
            return self._pending(connection, spec.canonical, held, most)

    def _pending(self, connection: Connection, spec: str, held: set[Adapter], most: int) -> list[int]:
        needs = needs_met(connection, spec, held)
        return pending_batches(connection, spec, needs, most=most)

    def _held(self, connection: Connection, spec: str) -> set[Adapter]:
        """The adapters of all live workers of a canonical spec."""
        written = connection.scalars(
            select(workers.c.adapters)
            .where(workers.c.spec == spec, workers.c.adapters.is_not(None), alive(self._database.now))
            .distinct()
        ).all()
        return {each for text in written for each in from_json(text)}

    def _take_page(self, which: ColumnElement[bool], outcome: RunOutcome) -> int:
        with self._database.write() as connection:
            ids = connection.scalars(
                select(batches.c.id)
                .where(which, batches.c.state == BatchState.LEASED.value)
                .order_by(batches.c.id)
                .limit(_PAGE)
                .with_for_update(key_share=True)
            ).all()
            if not ids:
                return 0
            of_jobs: set[str | None] = set()
            if outcome is RunOutcome.RELEASED:
                connection.execute(
                    update(batches)
                    .where(batches.c.id.in_(ids), batches.c.state.in_(BATCH_BEFORE[BatchState.PENDING]))
                    .values(state=BatchState.PENDING.value, **NO_LEASE)
                )
            else:
                of_jobs = {self._blaming.blame(connection, batch_id) for batch_id in ids}
            end_runs(connection, runs.c.batch_id.in_(ids), outcome, now=self._database.now)
            for job_id in sorted(each for each in of_jobs if each is not None):
                self._closing.close_if_done(connection, job_id)
            failpoint("recovery.taken")
            return len(ids)
