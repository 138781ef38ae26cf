"""The end of jobs: closing and cancelling, in transactions of at most half a second."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Integer, and_, literal, select, update

from batchmill.jobs.requests.request import MAX_BATCH_SIZE, ErrorCode
from batchmill.jobs.requests.states import JOB_BEFORE, OPEN_BATCH_STATES, BatchState, JobState, RequestState
from batchmill.jobs.runtime.failpoints import failpoint
from batchmill.jobs.store.database.conflicts import retried
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.tables import NO_LEASE, batches, jobs, outputs, requests

#: One transaction closes or moves at most this many requests; no batch holds more.
PAGE_REQUESTS = MAX_BATCH_SIZE
#: Pending batches looked at for one page; with the smallest batches a page holds fewer requests.
_BATCHES_A_PAGE = 1_000
_CANCELLED_MESSAGE = "the job was cancelled before this request was answered"


class Closing:
    """Ends jobs. Every call is safe at any time and twice; the same call finishes what one that was cut short left."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def close_if_done(self, connection: Connection, job_id: str) -> bool:
        """Closes a job of which no batch is open, inside the caller's transaction.

        The job's row is locked before its batches are read: else two workers that finish the last two batches
        at once would each see the other's as open, and nobody would close the job.
        The lock is one that foreign keys do not ask for (NO KEY UPDATE): else two workers that share a job's row
        by writing its batches would each wait for the other to let go.
        """
        state = connection.scalar(select(jobs.c.state).where(jobs.c.id == job_id).with_for_update(key_share=True))
        ends = JobState.CANCELLED if state == JobState.CANCELLING.value else JobState.COMPLETED
        if state is None or JobState(state) not in JOB_BEFORE[ends] or self._has_open(connection, job_id):
            return False
        connection.execute(
            update(jobs).where(jobs.c.id == job_id).values(state=ends.value, finished_at=self._database.now)
        )
        failpoint("job.closing")
        return True

    def close_finished(self) -> list[str]:
        """Closes every job that has nothing open, and what a cancel left unfinished; returns the ids closed."""
        with self._database.read() as connection:
            open_jobs = connection.execute(
                select(jobs.c.id, jobs.c.state)
                .where(jobs.c.state.in_([JobState.RUNNING.value, JobState.CANCELLING.value]))
                .order_by(jobs.c.id)
            ).all()
            due = [
                row.id
                for row in open_jobs
                if row.state == JobState.CANCELLING.value or not self._has_open(connection, row.id)
            ]
        closed = []
        for job_id in due:
            if self._close_pages(job_id):
                closed.append(job_id)
        return closed

    def close_batches(self, connection: Connection, batch_ids: list[int]) -> None:
        """Gives every unanswered request of these locked batches the error `cancelled`, and ends them."""
        if not batch_ids:
            return
        end_unanswered(
            self._database,
            connection,
            requests.c.batch_id.in_(batch_ids),
            state=RequestState.CANCELLED,
            code=ErrorCode.CANCELLED,
            message=_CANCELLED_MESSAGE,
        )
        connection.execute(
            update(batches)
            .where(batches.c.id.in_(batch_ids))
            .values(
                state=BatchState.CANCELLED.value,
                cancelled=batches.c.total - batches.c.succeeded - batches.c.failed,
                **NO_LEASE,
            )
        )

    def _has_open(self, connection: Connection, job_id: str) -> bool:
        one = select(batches.c.id).where(batches.c.job_id == job_id, batches.c.state.in_(OPEN_BATCH_STATES)).limit(1)
        return connection.scalar(one) is not None

    def cancel(self, job_id: str) -> JobState:
        """Cancels a job: closes at once what no lease holds; a worker that holds the rest closes it at its next sync.

        Returns the job's state afterwards. A closed job is left as it is.
        """
        self._begin_cancel(job_id)
        self._close_pages(job_id)
        with self._database.read() as connection:
            state = select(jobs.c.state).where(jobs.c.id == job_id)
            return JobState(connection.execute(state).scalar_one())

    @retried
    def _begin_cancel(self, job_id: str) -> None:
        with self._database.write() as connection:
            connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id, jobs.c.state.in_(JOB_BEFORE[JobState.CANCELLING]))
                .values(state=JobState.CANCELLING.value, retry_started_at=None)
            )

    @retried
    def _close_pages(self, job_id: str) -> bool:
        while True:
            with self._database.write() as connection:
                page = self._pending_page(connection, job_id)
                self.close_batches(connection, page)
                closed = self.close_if_done(connection, job_id)
            if closed or not page:
                return closed

    def _pending_page(self, connection: Connection, job_id: str) -> list[int]:
        """Pending batches of a cancelling job that hold at most a page of requests, locked by id."""
        pending = connection.execute(
            select(batches.c.id, batches.c.total)
            .select_from(batches.join(jobs, jobs.c.id == batches.c.job_id))
            .where(jobs.c.id == job_id, jobs.c.state == JobState.CANCELLING.value)
            .where(batches.c.state == BatchState.PENDING.value)
            .order_by(batches.c.id)
            .limit(_BATCHES_A_PAGE)
            .with_for_update(of=batches, key_share=True)
        ).all()
        page: list[int] = []
        room = PAGE_REQUESTS
        for row in pending:
            room -= row.total
            if page and room < 0:
                break
            page.append(row.id)
        return page


def end_unanswered(
    database: Database,
    connection: Connection,
    which: ColumnElement[bool],
    *,
    state: RequestState,
    code: ErrorCode,
    message: str,
    run_id: int | None = None,
) -> None:
    """Gives an error to those of these requests that have no output; the caller keeps the counts of their batches."""
    answered = and_(outputs.c.job_id == requests.c.job_id, outputs.c.index == requests.c.index)
    values: dict[str, ColumnElement[Any]] = {
        "job_id": requests.c.job_id,
        "index": requests.c.index,
        "run_id": literal(run_id, Integer),
        "state": literal(state.value),
        "payload": literal("[]"),
        "prompt_tokens": literal(0, Integer),
        "completion_tokens": literal(0, Integer),
        "error_code": literal(code.value),
        "error_message": literal(message),
        "finished_at": database.now,
    }
    unanswered = (
        select(*values.values())
        .select_from(requests.outerjoin(outputs, answered))
        .where(which, outputs.c.index.is_(None))
    )
    connection.execute(database.insert(outputs).from_select(list(values), unanswered).on_conflict_do_nothing())
