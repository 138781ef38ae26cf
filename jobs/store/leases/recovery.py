"""Recovery: takes leases back from dead workers, and lists what is pending. The reconciler's side of the store."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, func, select, update

from batchmill.jobs.models.adapters import from_json
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.kinds import KINDS
from batchmill.jobs.requests.states import (
    BATCH_BEFORE,
    CLAIMABLE_JOB_STATES,
    HOLDING_JOB_STATES,
    BatchState,
    JobState,
    RunOutcome,
)
from batchmill.jobs.runtime.failpoints import failpoint
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.bounds import octets, page_of
from batchmill.jobs.store.database.clock import is_over
from batchmill.jobs.store.database.conflicts import retried
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.jobs.close import Closing
from batchmill.jobs.store.leases.blame import Blaming
from batchmill.jobs.store.leases.lease import end_runs
from batchmill.jobs.store.leases.queue import Among, needs_met, pending_batches
from batchmill.jobs.store.tables import NO_LEASE, batches, jobs, requests, runs, workers
from batchmill.jobs.store.workers.liveness import alive

#: Batches that one transaction takes back: blaming the requests in flight takes ten queries for each.
_PAGE = 50


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker that holds leases."""

    worker_id: int
    #: None where it is unknown.
    process: Process | None
    #: The number of its children so far.
    generation: int
    #: Seconds since its last heartbeat.
    seen_seconds: float


class Recovery:
    """Every call is safe at any time, twice, and from several processes at once."""

    def __init__(self, database: Database, closing: Closing) -> None:
        self._database = database
        self._closing = closing
        self._blaming = Blaming(database)

    def held_by(self, worker_id: int, *, generation: int) -> dict[str, list[int]]:
        """Batches that this worker's children up to a generation hold, by their jobs."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(batches.c.job_id, batches.c.id)
                .where(_of_children(worker_id, generation), batches.c.state == BatchState.LEASED.value)
                .order_by(batches.c.id)
            ).all()
        held: defaultdict[str, list[int]] = defaultdict(list)
        for row in rows:
            held[row.job_id].append(row.id)
        return held

    def take_back(self, worker_id: int, *, generation: int, outcome: RunOutcome = RunOutcome.CRASHED) -> int:
        """Takes back every lease of this worker's children up to a generation, and returns their number.

        After a crash what was in flight is blamed (`jobs.store.leases.blame`); what was released is not.
        """
        taken = 0
        while page := self._take_page(_of_children(worker_id, generation), outcome):
            taken += page
        return taken

    def holders(self, host: str) -> list[Holder]:
        """The workers of a host that hold leases."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(
                    workers.c.id,
                    workers.c.process,
                    workers.c.generation,
                    (self._database.now - workers.c.heartbeat_at).label("seen_seconds"),
                )
                .where(
                    workers.c.host == host,
                    workers.c.id.in_(select(batches.c.worker_id).where(batches.c.worker_id.is_not(None))),
                )
                .order_by(workers.c.id)
            ).all()
        return [Holder(row.id, Process.parse(row.process), row.generation, row.seen_seconds) for row in rows]

    def silent(self, worker_ids: Collection[int]) -> dict[int, Process | None]:
        """Those of these workers that are not alive by their heartbeats, with their processes as far as known."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(workers.c.id, workers.c.process)
                .where(workers.c.id.in_(worker_ids), ~alive(self._database.now))
                .order_by(workers.c.id)
            ).all()
        return {row.id: Process.parse(row.process) for row in rows}

    def expired(
        self,
        *,
        lease_seconds: float,
        for_seconds: float = 0.0,
        of_jobs: Collection[JobState] = HOLDING_JOB_STATES,
    ) -> dict[int, tuple[int, float]]:
        """Batches whose lease is over, as `is_over` has it: {batch id: (fence, lease_until)}."""
        now = self._database.now
        over = is_over(batches.c.lease_until, now=now, lease_seconds=lease_seconds, for_seconds=for_seconds)
        with self._database.read() as connection:
            rows = connection.execute(
                select(batches.c.id, batches.c.fence, batches.c.lease_until)
                .select_from(jobs.join(batches, batches.c.job_id == jobs.c.id))
                .where(jobs.c.state.in_(of_jobs))
                .where(batches.c.state == BatchState.LEASED.value, over)
            ).all()
        return {row.id: (row.fence, row.lease_until) for row in rows}

    def reap(self, leases: Mapping[int, tuple[int, float]]) -> int:
        """Takes back these leases, as `expired` gave them, unless they were renewed since; returns their number.

        Nothing is blamed: a silent worker may have been paused, or cut off, as well as dead.
        """
        reaped = 0
        for batch_id, (fence, lease_until) in sorted(leases.items()):
            same = and_(batches.c.id == batch_id, batches.c.fence == fence, batches.c.lease_until == lease_until)
            reaped += self._take_page(same, RunOutcome.EXPIRED)
        return reaped

    def pending(self, *, most: int) -> dict[str, list[int]]:
        """The pending batches of open jobs, by canonical spec: at most `most` ids for each.

        Only what a live worker could take as far as is known: a wake-up for the rest would be for nothing.
        """
        with self._database.read() as connection:
            specs = connection.scalars(
                select(jobs.c.spec).where(jobs.c.state.in_(CLAIMABLE_JOB_STATES)).distinct()
            ).all()
            by_spec = {spec: self._pending(connection, spec, alive(self._database.now), most) for spec in specs}
        return {spec: ids for spec, ids in by_spec.items() if ids}

    def pending_of(self, spec: ModelSpec, *, most: int, worker_id: int | None = None) -> list[int]:
        """The pending batches of one spec, oldest job first, that this worker could take, or where None a live one."""
        who = alive(self._database.now) if worker_id is None else workers.c.id == worker_id
        with self._database.read() as connection:
            return self._pending(connection, spec.canonical, who, most)

    def _pending(self, connection: Connection, spec: str, who: ColumnElement[bool], most: int) -> list[int]:
        """The pending batches that one of these workers could take.

        Where none of them is there, or one has not loaded its model yet, jobs of every identity count.
        """
        holding = connection.execute(
            select(workers.c.identity, workers.c.adapters, workers.c.kinds)
            .where(workers.c.spec == spec, who)
            .distinct()
        ).all()
        identities = frozenset(row.identity for row in holding)
        kinds = {kind for row in holding for kind in json.loads(row.kinds)} or KINDS.keys()
        among = Among(spec, frozenset(kinds), identities if identities and None not in identities else None)
        needs = needs_met(connection, spec, {each for row in holding for each in from_json(row.adapters)})
        return pending_batches(connection, among, needs, most=most)

    def _page_of(self, connection: Connection, ids: Sequence[int]) -> list[int]:
        """Those of these batches, from the first on, whose requests one transaction can move."""
        bodies = select(func.sum(octets(self._database, requests.c.body))).where(requests.c.batch_id == batches.c.id)
        chosen = select(batches.c.id).where(batches.c.id.in_(ids)).order_by(batches.c.id)
        page = page_of(self._database, connection, chosen, size=func.coalesce(bodies.scalar_subquery(), 0))
        return [row[0] for row in page]

    @retried
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
            ids = self._page_of(connection, ids)
            of_jobs: set[str | None] = set()
            if outcome is not RunOutcome.CRASHED:
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


def _of_children(worker_id: int, generation: int) -> ColumnElement[bool]:
    """Batches of this worker's children up to a generation."""
    return and_(batches.c.worker_id == worker_id, batches.c.worker_generation <= generation)
