"""Opening a closed job again: its failed and cancelled requests become pending in new batches, page by page."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, func, or_, select, update

from jobs.errors import JobStateError
from jobs.states import CLOSED_JOB_STATES, JobState, RequestState
from jobs.store.bounds import octets, page_of
from jobs.store.conflicts import retried
from jobs.store.database import Database
from jobs.store.moving import move
from jobs.tables import batches, jobs, outputs, requests

#: One transaction moves about this many requests in a tenth of a second, and always whole batches of the job's size.
PAGE_REQUESTS = 1_000
#: One output that moves: place (its index), state, prompt_tokens, completion_tokens, batch_id, adapter, size_bytes.
_Moving = Row[Any]


class Retrying:
    """Cut short, the same call finishes it: the job keeps a mark until its last page."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def retry(self, job_id: str) -> int:
        """Makes the failed and cancelled requests of a closed job pending again: how many.

        Raises JobStateError for a job that is open, unless a retry of it was cut short.
        """
        most = self._begin_retry(job_id)
        moved = 0
        while (page := self._retry_page(job_id, most)) is not None:
            moved += page
        return moved

    @retried
    def _begin_retry(self, job_id: str) -> int:
        """Marks which outputs are meant: those that are there now. A retry cut short keeps its mark.

        How many requests a page of it moves.
        """
        with self._database.write() as connection:
            marked = connection.execute(
                update(jobs)
                .where(
                    jobs.c.id == job_id,
                    or_(jobs.c.state.in_(CLOSED_JOB_STATES), jobs.c.retry_started_at.is_not(None)),
                )
                .values(retry_started_at=func.coalesce(jobs.c.retry_started_at, self._mark(job_id)))
                .returning(jobs.c.batch_size)
            ).first()
            if marked is None:
                state = connection.scalar(select(jobs.c.state).where(jobs.c.id == job_id))
                raise JobStateError(
                    f"job {job_id} is {state}: wait until it has ended (`batchmill wait {job_id}`), then retry it"
                )
            batch_size = int(marked.batch_size)
            return max(1, PAGE_REQUESTS // batch_size) * batch_size

    def _mark(self, job_id: str) -> ColumnElement[float]:
        """Now, or the time of the job's last output where the clock was set back since."""
        last = select(func.max(outputs.c.finished_at)).where(
            outputs.c.job_id == job_id, outputs.c.state != RequestState.SUCCEEDED.value
        )
        return self._database.larger(self._database.now, func.coalesce(last.scalar_subquery(), 0.0))

    @retried
    def _retry_page(self, job_id: str, most: int) -> int | None:
        """Moves one page of at most so many requests: how many requests, None when nothing is left to move.

        The page is read again under the locks: another retry of the same job may have moved it meanwhile.
        """
        with self._database.write() as connection:
            seen = {row.batch_id for row in self._unsuccessful(connection, job_id, most)}
            self._lock(connection, seen)
            batch_size = self._reopen(connection, job_id, bool(seen))
            if batch_size is None or not seen:
                return None
            page = [row for row in self._unsuccessful(connection, job_id, most) if row.batch_id in seen]
            self._take_off(connection, page)
            indexes = [row.place for row in page]
            connection.execute(delete(outputs).where(outputs.c.job_id == job_id, outputs.c.index.in_(indexes)))
            for adapter in sorted({row.adapter for row in page}):
                alike = {row.place: row.size_bytes for row in page if row.adapter == adapter}
                move(connection, job_id, alike, batch_size=batch_size, adapter=adapter)
        return len(page)

    def _unsuccessful(self, connection: Connection, job_id: str, most: int) -> Sequence[_Moving]:
        same = and_(outputs.c.job_id == requests.c.job_id, outputs.c.index == requests.c.index)
        of_job = and_(outputs.c.job_id == job_id, outputs.c.state != RequestState.SUCCEEDED.value)
        marked = outputs.c.finished_at <= jobs.c.retry_started_at
        chosen = (
            select(
                outputs.c.index.label("place"),
                outputs.c.state,
                outputs.c.prompt_tokens,
                outputs.c.completion_tokens,
                requests.c.batch_id,
                batches.c.adapter,
            )
            .select_from(outputs.join(requests, same).join(jobs, jobs.c.id == outputs.c.job_id))
            .join(batches, batches.c.id == requests.c.batch_id)
            .where(of_job, marked)
            .order_by(outputs.c.index)
            .limit(most)
        )
        return page_of(self._database, connection, chosen, size=octets(self._database, requests.c.body))

    def _lock(self, connection: Connection, batch_ids: set[int]) -> None:
        connection.execute(
            select(batches.c.id)
            .where(batches.c.id.in_(batch_ids))
            .order_by(batches.c.id)
            .with_for_update(key_share=True)
        ).all()

    def _reopen(self, connection: Connection, job_id: str, more: bool) -> int | None:
        """Locks the job; opens it again when there is something to move, else takes the mark away.

        The job's batch size, or None when it is no longer marked (a cancel came in between).
        """
        row = connection.execute(
            select(jobs.c.state, jobs.c.batch_size)
            .where(jobs.c.id == job_id, jobs.c.retry_started_at.is_not(None))
            .with_for_update(key_share=True)
        ).first()
        if row is None:
            return None
        changes: dict[str, object] = {} if more else {"retry_started_at": None}
        if more and JobState(row.state) in CLOSED_JOB_STATES:
            changes |= {"state": JobState.QUEUED.value, "finished_at": None}
        if changes:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(changes))
        return int(row.batch_size)

    def _take_off(self, connection: Connection, page: Sequence[_Moving]) -> None:
        """Takes the requests that move, and what their outputs counted, off their old batches."""
        by_batch: defaultdict[int, Counter[str]] = defaultdict(Counter)
        for row in page:
            count = by_batch[row.batch_id]
            count["total"] += 1
            count[row.state] += 1
            count["prompt_tokens"] += row.prompt_tokens
            count["completion_tokens"] += row.completion_tokens
        for batch_id, count in sorted(by_batch.items()):
            less = {name: batches.c[name] - number for name, number in count.items()}
            connection.execute(update(batches).where(batches.c.id == batch_id).values(less))
