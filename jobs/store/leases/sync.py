"""The sync of a worker with the store: all that it reports and asks for, in one fenced transaction.

It saves outputs, records what is in flight, renews leases, finishes, cancels, releases and claims in one commit,
so that a kill between any two lines leaves either all of it or nothing.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, case, func, select, update

from batchmill.jobs.models.device_memory import Memory, devices_text
from batchmill.jobs.requests.kinds import kind_named
from batchmill.jobs.requests.request import Output
from batchmill.jobs.requests.states import BATCH_BEFORE, BatchState, JobState, RequestState, RunOutcome, WorkerState
from batchmill.jobs.runtime.failpoints import failpoint
from batchmill.jobs.store.database.conflicts import retried
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.jobs.close import Closing
from batchmill.jobs.store.leases.claim import Claiming
from batchmill.jobs.store.leases.lease import BatchReport, Claimed, Lease, SyncResult, WorkerSession, end_runs
from batchmill.jobs.store.tables import NO_LEASE, batches, jobs, outputs, runs, workers
from batchmill.jobs.store.workers.liveness import GIVEN_UP

_ENDING = GIVEN_UP | {WorkerState.DRAINING, WorkerState.STOPPED}


class Leases:
    """The worker's side of the store."""

    def __init__(self, database: Database, closing: Closing) -> None:
        self._database = database
        self._closing = closing
        self._claiming = Claiming(database)

    @retried
    def sync(
        self,
        session: WorkerSession,
        reports: Sequence[BatchReport],
        *,
        wanted_requests: int = 0,
        in_flight_room: int = 0,
        resumed: bool = False,
    ) -> SyncResult:
        """One commit of a worker.

        Saves the outputs and counts of every batch whose fence still holds, renews its lease, finishes it when
        nothing is pending, closes what was cancelled, releases what is handed back or what an idle worker
        could start instead; then claims batches until `wanted_requests` are there, of which the first
        `in_flight_room` are recorded as in flight. Beside a batch that runs apart nothing is claimed.

        `resumed`: nobody knows whether the last sync was committed, so leases that it may have brought, and that
        `reports` does not name, are handed back.
        """
        with self._database.write() as connection:
            if resumed:
                self._hand_back_strays(connection, session, reports)
            mine = self._lock(connection, reports)
            saved = {each.lease.batch_id: self._save(connection, each) for each in mine}
            for each in mine:
                self._renew(connection, session, each, saved[each.lease.batch_id])
            failpoint("turn.saved")
            finished = self._finish(connection, mine)
            cancelled = self._close_cancelled(connection, mine, finished)
            rest = [each for each in mine if each.lease.batch_id not in finished | cancelled]
            released = self._release(connection, session, rest)
            drain = self._draining(connection, session)
            kept = [each for each in rest if each.lease.batch_id not in released]
            if drain or any(each.lease.apart for each in kept):
                wanted_requests = 0
            claimed = self._claiming.claim(connection, session, bool(kept), wanted_requests, in_flight_room)
            failpoint("turn.claimed")
            self._advance(connection, session, mine, finished | cancelled, claimed)
        lost = {each.lease.batch_id for each in reports} - {each.lease.batch_id for each in mine}
        return SyncResult(frozenset(lost), finished, cancelled, released, claimed, drain)

    def _hand_back_strays(self, connection: Connection, session: WorkerSession, reports: Sequence[BatchReport]) -> None:
        known = {(each.lease.batch_id, each.lease.fence) for each in reports}
        mine = connection.execute(
            select(batches.c.id, batches.c.fence)
            .where(batches.c.worker_id == session.worker_id, batches.c.worker_generation == session.generation)
            .order_by(batches.c.id)
            .with_for_update(key_share=True)
        ).all()
        strays = [row.id for row in mine if (row.id, row.fence) not in known]
        if strays:
            self._free(connection, strays)
            which = runs.c.batch_id.in_(strays)
            end_runs(connection, which, RunOutcome.RELEASED, now=self._database.now)

    def _free(self, connection: Connection, batch_ids: Sequence[int]) -> None:
        connection.execute(
            update(batches)
            .where(batches.c.id.in_(batch_ids), batches.c.state.in_(BATCH_BEFORE[BatchState.PENDING]))
            .values(state=BatchState.PENDING.value, **NO_LEASE)
        )

    def _lock(self, connection: Connection, reports: Sequence[BatchReport]) -> list[BatchReport]:
        """Locks the batches; those whose fence still holds, by id."""
        if not reports:
            return []
        ids = [each.lease.batch_id for each in reports]
        locked = connection.execute(
            select(batches.c.id, batches.c.fence)
            .where(batches.c.id.in_(ids), batches.c.state == BatchState.LEASED.value)
            .order_by(batches.c.id)
            .with_for_update(key_share=True)
        ).all()
        fences = {row.id: row.fence for row in locked}
        mine = [each for each in reports if fences.get(each.lease.batch_id) == each.lease.fence]
        return sorted(mine, key=lambda each: each.lease.batch_id)

    def _save(self, connection: Connection, report: BatchReport) -> _SavedCounts:
        """Inserts the outputs that are not there yet: their counts and tokens, for batch and run."""
        if not report.outputs:
            return _SavedCounts({}, {}, 0)
        rows = [_output_row(each, report.lease.run_id) for each in report.outputs]
        statement = self._database.insert(outputs).values(finished_at=self._database.now).on_conflict_do_nothing()
        names = ("index", "state", "prompt_tokens", "completion_tokens", "error_code")
        returned = [outputs.c[name] for name in names]
        new = connection.execute(statement.returning(*returned), rows).all()
        self._add_codes(connection, report.lease.run_id, Counter(row.error_code for row in new if row.error_code))
        states = Counter(row.state for row in new)
        counts = {
            "succeeded": states[RequestState.SUCCEEDED.value],
            "failed": states[RequestState.FAILED.value],
            "prompt_tokens": sum(row.prompt_tokens for row in new),
            "completion_tokens": sum(row.completion_tokens for row in new),
        }
        answered = sum(row.prompt_tokens for row in new if row.state == RequestState.SUCCEEDED.value)
        return _SavedCounts(counts, _reasons(report, {row[0] for row in new}), answered)

    def _renew(self, connection: Connection, session: WorkerSession, report: BatchReport, saved: _SavedCounts) -> None:
        """Adds the counts to batch and run, records what is in flight, renews the lease."""
        lease, memory = report.lease, report.memory
        connection.execute(
            update(batches)
            .where(batches.c.id == lease.batch_id)
            .values(
                {name: batches.c[name] + count for name, count in saved.counts.items()}
                | _with_reasons(saved.reasons)
                | {"lease_until": self._database.now + session.lease_seconds}
            )
        )
        larger = self._database.larger
        connection.execute(
            update(runs)
            .where(runs.c.id == lease.run_id)
            .values({name: runs.c[name] + count for name, count in saved.counts.items()})
            .values(prompt_tokens=runs.c.prompt_tokens + saved.answered_prompt_tokens)
            .values(_of_devices(memory))
            .values(
                in_flight=json.dumps(list(report.in_flight)),
                in_flight_tokens=report.in_flight_tokens,
                weights_bytes=larger(runs.c.weights_bytes, memory.weights_bytes),
                device_total_bytes=larger(runs.c.device_total_bytes, memory.device_total_bytes),
                peak_allocated_bytes=larger(runs.c.peak_allocated_bytes, memory.peak_allocated_bytes),
                peak_reserved_bytes=larger(runs.c.peak_reserved_bytes, memory.peak_reserved_bytes),
            )
        )

    def _add_codes(self, connection: Connection, run_id: int, codes: Counter[str]) -> None:
        if not codes:
            return
        before = json.loads(connection.execute(select(runs.c.error_codes).where(runs.c.id == run_id)).scalar_one())
        total = dict(Counter(before) + codes)
        connection.execute(update(runs).where(runs.c.id == run_id).values(error_codes=json.dumps(total)))

    def _finish(self, connection: Connection, mine: Sequence[BatchReport]) -> frozenset[int]:
        """Ends the batches of which nothing is pending."""
        done = batches.c.succeeded + batches.c.failed + batches.c.cancelled == batches.c.total
        ids = [each.lease.batch_id for each in mine]
        if not ids:
            return frozenset()
        finished = frozenset(
            connection.scalars(
                update(batches)
                .where(batches.c.id.in_(ids), done, batches.c.state.in_(BATCH_BEFORE[BatchState.DONE]))
                .values(state=BatchState.DONE.value, **NO_LEASE)
                .returning(batches.c.id)
            ).all()
        )
        self._end_runs(connection, [each.lease for each in mine if each.lease.batch_id in finished], RunOutcome.DONE)
        return finished

    def _close_cancelled(
        self, connection: Connection, mine: Sequence[BatchReport], finished: frozenset[int]
    ) -> frozenset[int]:
        """Gives every unfinished request of a cancelled job its output."""
        rest = [each.lease for each in mine if each.lease.batch_id not in finished and not each.more]
        of_jobs = {lease.job_id for lease in rest}
        if not of_jobs:
            return frozenset()
        cancelling = connection.scalars(
            select(jobs.c.id).where(jobs.c.id.in_(of_jobs), jobs.c.state == JobState.CANCELLING.value)
        ).all()
        leases = [lease for lease in rest if lease.job_id in set(cancelling)]
        self._closing.close_batches(connection, [lease.batch_id for lease in leases])
        self._end_runs(connection, leases, RunOutcome.CANCELLED)
        return frozenset(lease.batch_id for lease in leases)

    def _release(self, connection: Connection, session: WorkerSession, rest: Sequence[BatchReport]) -> frozenset[int]:
        """Hands back what is to be handed back, and what idle workers could start where nothing is pending."""
        leases = [each.lease for each in rest if each.release]
        untouched = [each.lease for each in rest if each.untouched and not each.release]
        if untouched:
            leases += self._claiming.for_idle(connection, session, untouched)
        if leases:
            self._free(connection, [lease.batch_id for lease in leases])
            self._end_runs(connection, leases, RunOutcome.RELEASED)
        return frozenset(lease.batch_id for lease in leases)

    def _draining(self, connection: Connection, session: WorkerSession) -> bool:
        """True where the worker is to end, or has given up: a child of it may not know yet."""
        state = connection.scalar(select(workers.c.state).where(workers.c.id == session.worker_id))
        return state in _ENDING

    def _advance(
        self,
        connection: Connection,
        session: WorkerSession,
        mine: Sequence[BatchReport],
        ended: frozenset[int],
        claimed: Iterable[Claimed],
    ) -> None:
        """Moves the jobs on, by id: those with a claimed batch run, those with nothing open are closed."""
        begun: defaultdict[str, set[str]] = defaultdict(set)
        for each in claimed:
            begun[each.lease.job_id] |= {each.adapter} if each.adapter else set()
        touched = {each.lease.job_id for each in mine if each.lease.batch_id in ended}
        for job_id in sorted(begun.keys() | touched):
            if job_id in begun:
                self._claiming.begin_job(connection, session, job_id, adapters=begun[job_id])
            if job_id in touched:
                self._closing.close_if_done(connection, job_id)

    def _end_runs(self, connection: Connection, leases: Sequence[Lease], outcome: RunOutcome) -> None:
        if leases:
            which = runs.c.id.in_([lease.run_id for lease in leases])
            end_runs(connection, which, outcome, now=self._database.now)


class _SavedCounts(NamedTuple):
    """The counts of what a sync saved of one batch."""

    #: Outputs by state, and tokens, by column.
    counts: Mapping[str, int]
    #: Choices by the reason that ended them, by column.
    reasons: Mapping[str, int]
    #: A run counts these alone, since refused prompts are no part of its speed.
    answered_prompt_tokens: int


def _reasons(report: BatchReport, saved: Collection[int]) -> Mapping[str, int]:
    """Counts the ends of the parts of the outputs at these indexes, by reason, where their kind has reasons."""
    reasons_of = kind_named(report.lease.kind).finish_reasons
    if reasons_of is None:
        return {}
    ended = Counter(reason for each in report.outputs if each.key.index in saved for reason in reasons_of(each))
    return {"stop_choices": ended["stop"], "length_choices": ended["length"]}


def _with_reasons(reasons: Mapping[str, int]) -> dict[str, Any]:
    """The new values of a batch's columns; one that was answered before anybody counted stays without counts."""
    is_new = batches.c.succeeded == 0
    return {
        name: case((is_new, func.coalesce(batches.c[name], 0)), else_=batches.c[name]) + count
        for name, count in reasons.items()
    }


def _of_devices(memory: Memory) -> dict[str, object]:
    """The columns of a run about its devices since it began; none for outputs that a crash left behind."""
    values = {"devices": devices_text(memory.devices), "energy_joules": memory.energy_joules}
    return {name: each for name, each in values.items() if each is not None}


def _output_row(output: Output, run_id: int) -> dict[str, object]:
    error, timings = output.error, output.timings
    return {
        "job_id": output.key.job_id,
        "index": output.key.index,
        "run_id": run_id,
        "state": output.state.value,
        "payload": output.payload_text(),
        "prompt_tokens": output.prompt_tokens,
        "completion_tokens": output.completion_tokens,
        "error_code": None if error is None else error.code,
        "error_message": None if error is None else error.message,
        "queued_seconds": None if timings is None else timings.queued_seconds,
        "prefill_seconds": None if timings is None else timings.prefill_seconds,
        "decode_seconds": None if timings is None else timings.decode_seconds,
    }
