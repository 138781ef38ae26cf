"""Claiming: which batch a worker gets next, and the one UPDATE that gives it to a single worker.

The oldest job's lowest batch comes first. Beyond its first batch a worker gets only what no idle worker could start.
Suspects of a crash run apart: a worker that holds nothing gets such a batch before any other, and nothing beside it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, func, insert, literal_column, select, update

from jobs.schema import JobOptions, Request, SamplingParams
from jobs.states import BATCH_BEFORE, CLAIMABLE_JOB_STATES, JOB_BEFORE, BatchState, JobState
from jobs.store.database import Database
from jobs.store.lease import Claimed, Lease, Seat
from jobs.store.workers import idle_workers
from jobs.tables import batches, jobs, outputs, requests, runs

#: How far pending batches are counted when they are compared with idle workers.
_COUNT_LIMIT = 500
#: Written as the partial index has it.
_SUSPECT = batches.c.crashes > literal_column("0")


class Claiming:
    """Steps inside a worker's turn; each takes the turn's connection."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(
        self, connection: Connection, seat: Seat, holds: bool, wanted_requests: int, in_flight_room: int
    ) -> tuple[Claimed, ...]:
        """Claims until `wanted_requests` are there; beyond the first batch only what no idle worker could start."""
        claimed: list[Claimed] = []
        spare: int | None = None
        while wanted_requests > 0:
            if holds or claimed:
                if spare is None:
                    spare = self._spare(connection, seat)
                if spare <= 0:
                    break
                spare -= 1
            batch = self._claim_one(connection, seat, in_flight_room, alone=not holds and not claimed)
            if batch is None:
                break
            claimed.append(batch)
            if batch.lease.apart:
                break
            wanted_requests -= len(batch.requests)
            in_flight_room -= batch.in_flight
        return tuple(claimed)

    def _spare(self, connection: Connection, seat: Seat) -> int:
        """By how many the pending batches outnumber the live workers that hold none (up to a page)."""
        idle = self.idle(connection, seat)
        return len(pending_batches(connection, seat.spec.canonical, only_job=seat.only_job, most=_COUNT_LIMIT)) - idle

    def idle(self, connection: Connection, seat: Seat) -> int:
        return idle_workers(
            connection,
            spec=seat.spec.canonical,
            job_id=seat.only_job,
            other_than=seat.worker_id,
            now=self._database.now,
        )

    def _claim_one(self, connection: Connection, seat: Seat, in_flight_room: int, *, alone: bool) -> Claimed | None:
        """Claims the best pending batch; None if there is none, or if it runs apart and the worker is not alone.

        A worker that is alone (after a crash its new process is) takes suspects first, while the others go on. Who
        meets them behind the rest of their job claims nothing that comes after them: a worker that always found more
        would never be alone, and they would wait for ever.
        """
        pending = _pending(seat.spec.canonical, seat.only_job)
        found = self._best(connection, pending.where(_SUSPECT)) if alone else None
        found = found or self._best(connection, pending)
        if found is None or (found.crashes and not alone):
            return None
        batch_id = found.id
        won = connection.execute(
            update(batches)
            .where(batches.c.id == batch_id, batches.c.state.in_(BATCH_BEFORE[BatchState.LEASED]))
            .values(
                state=BatchState.LEASED.value,
                fence=batches.c.fence + 1,
                worker_id=seat.worker_id,
                worker_generation=seat.generation,
                lease_until=self._database.now + seat.lease_seconds,
            )
            .returning(batches.c.fence, batches.c.job_id)
        ).one()
        prompts = self._unanswered(connection, seat, batch_id, won.job_id)
        first = max(0, min(in_flight_room, len(prompts)))
        in_flight = [each.index for each in prompts[:first]]
        run_id = self._begin_run(connection, seat, batch_id, won, in_flight)
        lease = Lease(batch_id, won.fence, run_id, won.job_id, apart=found.crashes > 0)
        return Claimed(lease, prompts, first)

    def _best(self, connection: Connection, pending: Select[Any]) -> Row[Any] | None:
        best = pending.limit(1).with_for_update(skip_locked=True, of=batches, key_share=True)
        return connection.execute(best).first()

    def _unanswered(self, connection: Connection, seat: Seat, batch_id: int, job_id: str) -> tuple[Request, ...]:
        options = self._options(connection, seat, job_id)
        answered = and_(outputs.c.job_id == requests.c.job_id, outputs.c.index == requests.c.index)
        rows = connection.execute(
            select(requests.c.index, requests.c.custom_id, requests.c.body)
            .select_from(requests.outerjoin(outputs, answered))
            .where(requests.c.batch_id == batch_id, outputs.c.index.is_(None))
            .order_by(requests.c.index)
        ).all()
        return tuple(Request.from_body(*row).under(options) for row in rows)

    def _options(self, connection: Connection, seat: Seat, job_id: str) -> JobOptions:
        """What holds for a job's requests: what was written down, or else what `begin_job` will write."""
        row = connection.execute(select(jobs.c.options, jobs.c.sampling).where(jobs.c.id == job_id)).one()
        asked = JobOptions.from_json(json.loads(row.options))
        if row.sampling is not None:
            return replace(asked, sampling=SamplingParams.from_json(json.loads(row.sampling)))
        return replace(asked, sampling=asked.sampling.over(seat.defaults).over(SamplingParams.fallback()))

    def begin_job(self, connection: Connection, seat: Seat, job_id: str) -> None:
        """A batch of this job was claimed: it runs, and what holds for its requests is written down.

        A step of its own after all claims, since the jobs' rows are locked after the batches', by id.
        """
        row = connection.execute(
            select(jobs.c.state, jobs.c.sampling, jobs.c.versions)
            .where(jobs.c.id == job_id)
            .with_for_update(key_share=True)
        ).one()
        changes: dict[str, Any] = {}
        if row.sampling is None:
            held = self._options(connection, seat, job_id).sampling
            changes["sampling"] = json.dumps(held.to_json())
            changes["versions"] = json.dumps(json.loads(row.versions) | dict(seat.versions))
        if JobState(row.state) in JOB_BEFORE[JobState.RUNNING]:
            changes["state"] = JobState.RUNNING.value
            changes["started_at"] = func.coalesce(jobs.c.started_at, self._database.now)
        if changes:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(changes))

    def _begin_run(
        self,
        connection: Connection,
        seat: Seat,
        batch_id: int,
        won: Row[Any],
        in_flight: list[int],
    ) -> int:
        run = insert(runs).values(
            job_id=won.job_id,
            batch_id=batch_id,
            fence=won.fence,
            worker_id=seat.worker_id,
            worker_generation=seat.generation,
            device=seat.device,
            device_uuid=seat.device_uuid,
            model_commit=seat.model_commit,
            model_load_seconds=seat.model_load_seconds,
            started_at=self._database.now,
            in_flight=json.dumps(in_flight),
            error_codes="{}",
        )
        return int(connection.execute(run.returning(runs.c.id)).scalar_one())


def pending_batches(connection: Connection, spec: str, *, most: int, only_job: str | None = None) -> list[int]:
    """Ids of pending batches of this canonical spec, the oldest job's first."""
    return list(connection.scalars(_pending(spec, only_job).limit(most)).all())


def _pending(spec: str, only_job: str | None) -> Select[Any]:
    chosen = (
        select(batches.c.id, batches.c.crashes)
        .select_from(jobs.join(batches, batches.c.job_id == jobs.c.id))
        .where(jobs.c.spec == spec, jobs.c.state.in_(CLAIMABLE_JOB_STATES))
        .where(batches.c.state == BatchState.PENDING.value)
        .order_by(jobs.c.queued_at, jobs.c.id, batches.c.id)
    )
    return chosen if only_job is None else chosen.where(jobs.c.id == only_job)
