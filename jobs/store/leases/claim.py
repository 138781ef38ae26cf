"""Claiming: which batch a worker gets next, and the one UPDATE that gives it to a single worker.

The oldest job's lowest batch comes first, of those that need no adapter but what the worker holds. Beyond its first
batch a worker gets only what no idle worker could start.
Suspects of a crash run apart: a worker that holds nothing gets such a batch before any other, and nothing beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Column, Connection, Row, ScalarSelect, and_, func, insert, select, update

from batchmill.jobs.errors import StoreBusy
from batchmill.jobs.models.adapters import from_json, to_json
from batchmill.jobs.models.identity import differences
from batchmill.jobs.requests.kinds import kind_named
from batchmill.jobs.requests.request import JobOptions, Request, RequestKind
from batchmill.jobs.requests.states import BATCH_BEFORE, JOB_BEFORE, BatchState, JobState
from batchmill.jobs.store.bounds import PAGE_BYTES, text_bytes
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.leases.lease import Claimed, Lease, WorkerSession
from batchmill.jobs.store.leases.queue import Among, Need, count_pending, heads, needs_met, waiting
from batchmill.jobs.store.tables import NO_ADAPTER, batches, jobs, outputs, requests, runs, workers
from batchmill.jobs.store.workers.idle import idle_workers

#: Pending batches are counted up to this many when they are compared with idle workers.
_COUNT_LIMIT = 500
#: So many jobs are tried where others hold the locks of all that is pending.
_MOST_JOBS = 100


def _among(session: WorkerSession) -> Among:
    """The jobs that this worker may take."""
    return Among(
        session.spec.canonical,
        session.kinds,
        frozenset([session.identity]),
        session.only_job,
        begun=not session.may_begin,
    )


class Claiming:
    """Steps inside a worker's sync; each takes the connection of its transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(
        self, connection: Connection, session: WorkerSession, holds: bool, wanted_requests: int, in_flight_room: int
    ) -> tuple[Claimed, ...]:
        """Claims until `wanted_requests` or a page of bytes are there; beyond the first batch only what no idle worker
        could start.
        """
        claimed: list[Claimed] = []
        spare: Counter[str] | None = None
        met: Sequence[Need] = (
            needs_met(connection, session.spec.canonical, session.adapters) if wanted_requests > 0 else ()
        )
        while wanted_requests > 0:
            if holds or claimed:
                if spare is None:
                    spare = self._spare(connection, session, met)
                met = [each for each in met if spare[each.adapter] > 0]
            batch = self._claim_one(connection, session, met, in_flight_room, alone=not holds and not claimed)
            if batch is None:
                break
            claimed.append(batch)
            if batch.lease.apart:
                break
            if spare is not None:
                spare[batch.adapter or NO_ADAPTER] -= 1
            wanted_requests -= len(batch.requests)
            in_flight_room -= batch.in_flight
            if sum(each.size_bytes for each in claimed) >= PAGE_BYTES:
                break
        return tuple(claimed)

    def _spare(self, connection: Connection, session: WorkerSession, met: Sequence[Need]) -> Counter[str]:
        """Pending batches that are left, by the adapter needed, once every idle worker has taken one.

        Workers that hold the fewest adapters take first, and each takes a batch that few can take before one that all
        can. Only a page of batches is counted.
        """
        spare = count_pending(connection, _among(session), met, most=_COUNT_LIMIT)
        for names, count in sorted(self.idle(connection, session).items(), key=lambda each: len(each[0])):
            free = count
            for name in (*sorted(names), NO_ADAPTER):
                taken = min(free, spare[name])
                spare[name] -= taken
                free -= taken
        return spare

    def idle(self, connection: Connection, session: WorkerSession) -> dict[frozenset[str], int]:
        """The number of idle workers beside the one that asks, by the adapters they hold."""
        return idle_workers(
            connection,
            spec=session.spec.canonical,
            identity=session.identity,
            kinds=session.kinds,
            job_id=session.only_job,
            other_than=session.worker_id,
            now=self._database.now,
        )

    def for_idle(self, connection: Connection, session: WorkerSession, untouched: Sequence[Lease]) -> list[Lease]:
        """The leases that idle workers, with nothing pending for them, could start; the last claimed go first."""
        idle = self.idle(connection, session)
        if not idle:
            return []
        takeable = [Need(name) for name in {NO_ADAPTER}.union(*idle)]
        pending_heads = heads(connection, _among(session), takeable, most=1)
        unclaimed = {each.adapter for each in pending_heads}
        needed = self._needed(connection, untouched)
        given: list[Lease] = []
        for names, count in sorted(idle.items(), key=lambda each: len(each[0])):
            takes = {NO_ADAPTER, *names}
            if not takes & unclaimed:
                free = [each for each in untouched if needed[each.batch_id] in takes and each not in given]
                given += free[len(free) - min(count, len(free)) :]
        return given

    def _needed(self, connection: Connection, leases: Sequence[Lease]) -> dict[int, str]:
        """The adapter that each of these batches needs."""
        ids = [each.batch_id for each in leases]
        rows = connection.execute(select(batches.c.id, batches.c.adapter).where(batches.c.id.in_(ids))).all()
        return {row.id: row.adapter for row in rows}

    def _claim_one(
        self, connection: Connection, session: WorkerSession, met: Sequence[Need], in_flight_room: int, *, alone: bool
    ) -> Claimed | None:
        """Claims the best pending batch; None if there is none, or if it runs apart and the worker is not alone.

        A worker that is alone (after a crash its new process is) takes suspects first, while the others go on. A worker
        that meets suspects behind the rest of their job claims nothing that comes after them: if it always found more,
        it would never be alone, and they would wait for ever.
        """
        best = self._best(connection, session, met, suspects=True) if alone else None
        best = best or self._best(connection, session, met)
        if best is None or (best.crashes and not alone):
            return None
        batch_id = best.id
        won = connection.execute(
            update(batches)
            .where(batches.c.id == batch_id, batches.c.state.in_(BATCH_BEFORE[BatchState.LEASED]))
            .values(
                state=BatchState.LEASED.value,
                fence=batches.c.fence + 1,
                worker_id=session.worker_id,
                worker_generation=session.generation,
                lease_until=self._database.now + session.lease_seconds,
            )
            .returning(batches.c.fence, batches.c.job_id)
        ).one()
        kind, options = self._options(connection, session, won.job_id)
        prompts, size_bytes = self._unanswered(connection, batch_id, kind, options)
        first = max(0, min(in_flight_room, len(prompts)))
        in_flight = [each.index for each in prompts[:first]]
        run_id = self._begin_run(connection, session, batch_id, won, in_flight)
        lease = Lease(batch_id, won.fence, run_id, won.job_id, apart=best.crashes > 0, kind=kind.name)
        return Claimed(lease, prompts, first, best.adapter or None, size_bytes)

    def _best(
        self, connection: Connection, session: WorkerSession, met: Sequence[Need], *, suspects: bool = False
    ) -> Any:
        """The first pending batch that the worker may take, locked; what others have locked is passed over."""
        candidates = heads(connection, _among(session), met, suspects=suspects, most=_MOST_JOBS)
        for head in candidates:
            first = (
                select(batches.c.id, batches.c.crashes, batches.c.adapter)
                .where(batches.c.job_id == head.job_id, *waiting(head.adapter, suspects=suspects))
                .order_by(batches.c.id)
                .limit(1)
            )
            best: Any = connection.execute(first.with_for_update(skip_locked=True, key_share=True)).first()
            if best is not None:
                return best
        return None

    def _unanswered(
        self, connection: Connection, batch_id: int, kind: RequestKind[Any, Any], options: JobOptions
    ) -> tuple[tuple[Request, ...], int]:
        """The requests of a batch that have no output yet, and the bytes of their bodies."""
        answered = and_(outputs.c.job_id == requests.c.job_id, outputs.c.index == requests.c.index)
        rows = connection.execute(
            select(requests.c.index, requests.c.custom_id, requests.c.body)
            .select_from(requests.outerjoin(outputs, answered))
            .where(requests.c.batch_id == batch_id, outputs.c.index.is_(None))
            .order_by(requests.c.index)
        ).all()
        return (
            tuple(kind.request(*row, options) for row in rows),
            sum(text_bytes(row.body) for row in rows),
        )

    def _options(
        self, connection: Connection, session: WorkerSession, job_id: str
    ) -> tuple[RequestKind[Any, Any], JobOptions]:
        """The kind of a job's requests, and their options: those written down, or those that `begin_job` will write."""
        row = connection.execute(select(jobs.c.kind, jobs.c.options, jobs.c.sampling).where(jobs.c.id == job_id)).one()
        kind = kind_named(row.kind)
        settled = None if row.sampling is None else json.loads(row.sampling)
        return kind, kind.options(json.loads(row.options), settled, session.defaults)

    def begin_job(
        self, connection: Connection, session: WorkerSession, job_id: str, *, adapters: Collection[str]
    ) -> None:
        """Starts a job of which batches that need these adapters were claimed, and writes down what holds for it.

        A step of its own after all claims, since the jobs' rows are locked after the batches', by id.
        """
        row = connection.execute(
            select(jobs.c.state, jobs.c.sampling, jobs.c.versions, jobs.c.identity, jobs.c.adapters)
            .where(jobs.c.id == job_id)
            .with_for_update(key_share=True)
        ).one()
        changes: dict[str, Any] = {}
        if row.identity is None:
            changes["identity"] = session.identity
        elif row.identity != session.identity:
            raise StoreBusy(
                f"another worker began job {job_id} at the same moment, and this one holds a model with another"
                f" {differences(row.identity, session.identity)}; it claims again without that job"
            )
        if row.sampling is None:
            _, options = self._options(connection, session, job_id)
            changes["sampling"] = json.dumps(options.settled())
            changes["versions"] = json.dumps(json.loads(row.versions) | dict(session.versions))
        if adapters:
            changes |= self._settled(row.adapters, session, job_id, adapters)
        if JobState(row.state) in JOB_BEFORE[JobState.RUNNING]:
            changes["state"] = JobState.RUNNING.value
            changes["started_at"] = func.coalesce(jobs.c.started_at, self._database.now)
        if changes:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(changes))

    def _settled(
        self, before: str | None, session: WorkerSession, job_id: str, adapters: Collection[str]
    ) -> dict[str, str]:
        """The meanings of these adapters to the job from now on, so that its outputs never mix two meanings of a name.

        Raises StoreBusy where another worker has settled one otherwise since this one looked.
        """
        settled = {each.name: each for each in from_json(before)}
        for each in session.adapters:
            if each.name not in adapters:
                continue
            mine = settled.get(each.name, each)
            if not mine.agrees_with(each):
                raise StoreBusy(
                    f"another worker began job {job_id} at the same moment with {mine}, and this one"
                    f" holds another one, {each}; it claims again without that job"
                )
            settled[each.name] = mine if each.identity is None else each
        after = to_json(settled.values())
        return {} if after == before else {"adapters": after}

    def _begin_run(
        self,
        connection: Connection,
        session: WorkerSession,
        batch_id: int,
        won: Row[Any],
        in_flight: list[int],
    ) -> int:
        """Inserts the run and returns its id. It keeps the child's loading times, which the next child's replace."""
        loading = {name: _of_generation(session, workers.c[name]) for name in ("loading_since", "torch_load_seconds")}
        run = insert(runs).values(
            job_id=won.job_id,
            batch_id=batch_id,
            fence=won.fence,
            worker_id=session.worker_id,
            worker_generation=session.generation,
            device=session.device,
            device_uuid=session.device_uuid,
            model_commit=session.model_commit,
            model_load_seconds=session.model_load_seconds,
            started_at=self._database.now,
            in_flight=json.dumps(in_flight),
            error_codes="{}",
            **loading,
        )
        return int(connection.execute(run.returning(runs.c.id)).scalar_one())


def _of_generation(session: WorkerSession, column: Column[float]) -> ScalarSelect[float]:
    """A column of the worker's row while it is of this generation; NULL once it is of a newer one."""
    mine = and_(workers.c.id == session.worker_id, workers.c.generation == session.generation)
    return select(column).where(mine).scalar_subquery()
