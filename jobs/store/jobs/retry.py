"""The retry of a closed job: its failed and cancelled requests become pending in new batches, page by page.

A request that another try would end in the same way is left as it is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, exists, func, or_, select, update

from batchmill.jobs.errors import JobStateError
from batchmill.jobs.requests.causes import Chances
from batchmill.jobs.requests.states import CLOSED_JOB_STATES, JobState, RequestState
from batchmill.jobs.store.bounds import octets, page_of
from batchmill.jobs.store.database.conflicts import retried
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.jobs.rebatch import move
from batchmill.jobs.store.tables import batches, jobs, outputs, requests

#: One transaction moves about this many requests in a tenth of a second, and always whole batches of the job's size.
PAGE_REQUESTS = 1_000
#: So many outputs are looked at in one read, which takes no lock that a writer waits for.
_LOOK_REQUESTS = 10_000
#: So many of the requests that are left alone are named.
_NAMED = 3
_ALL = Chances()
#: One output that moves: place (its index), state, prompt_tokens, completion_tokens, batch_id, adapter, size_bytes.
_Moving = Row[Any]


@dataclass(slots=True)
class LeftAlone:
    """Requests that ended with one error and were left alone: how many, the first of them, and the shortest prompt."""

    count: int = 0
    indexes: list[int] = field(default_factory=list)
    shortest_tokens: int = 0

    def add(self, index: int, prompt_tokens: int) -> None:
        """One more of them."""
        self.shortest_tokens = min(prompt_tokens, self.shortest_tokens) if self.count else prompt_tokens
        self.count += 1
        if len(self.indexes) < _NAMED:
            self.indexes.append(index)


@dataclass(slots=True)
class Retried:
    """Requests that are pending again, and those left alone, by the code of their error."""

    moved: int = 0
    left: defaultdict[str, LeftAlone] = field(default_factory=lambda: defaultdict(LeftAlone))
    #: True where no cancel and no other retry of the job came in between, so that all of it was looked at.
    is_whole: bool = True


class Retries:
    """Retries jobs. The same call finishes one that was cut short: the job keeps a mark until its last page."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def retry(self, job_id: str, chances: Chances = _ALL) -> Retried:
        """Makes failed and cancelled requests of a closed job pending again, as far as these chances are there.

        Raises JobStateError for a job that is open, unless a retry of it was cut short.
        """
        page_requests = self._begin_retry(job_id)
        result = Retried()
        chosen = self._chosen(job_id, chances, result.left)
        while page := list(islice(chosen, page_requests)):
            while page:
                moved, page = self._retry_page(job_id, page, keeps_model=chances.keeps_model)
                result.moved += moved
        result.is_whole = self._end_retry(job_id)
        return result

    def is_cut_short(self, job_id: str) -> bool:
        """True where a retry of this job was begun and not ended."""
        with self._database.read() as connection:
            began = connection.scalar(select(jobs.c.retry_started_at).where(jobs.c.id == job_id))
        return began is not None

    def unsuccessful(self, job_id: str) -> dict[str, LeftAlone]:
        """Requests of a job that have ended without success, by the code of their error; none of them by its index."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(
                    outputs.c.error_code,
                    func.count().label("number"),
                    func.min(outputs.c.prompt_tokens).label("shortest_tokens"),
                )
                .where(_is_unsuccessful(job_id))
                .group_by(outputs.c.error_code)
                .order_by(outputs.c.error_code)
            ).all()
        return {row.error_code: LeftAlone(row.number, shortest_tokens=row.shortest_tokens) for row in rows}

    @retried
    def _begin_retry(self, job_id: str) -> int:
        """Marks the outputs that are meant, those that are there now, and returns the requests that a page moves.

        A retry that was cut short keeps its mark.
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
        last = select(func.max(outputs.c.finished_at)).where(_is_unsuccessful(job_id))
        return self._database.larger(self._database.now, func.coalesce(last.scalar_subquery(), 0.0))

    def _chosen(self, job_id: str, chances: Chances, left: defaultdict[str, LeftAlone]) -> Iterator[int]:
        """Indexes of the requests to move, in order, read in pages; the others are counted in `left`."""
        last = -1
        while page := self._look(job_id, after=last):
            for row in page:
                if chances.are_there(row.error_code, prompt_tokens=row.prompt_tokens):
                    yield row.place
                else:
                    left[row.error_code].add(row.place, row.prompt_tokens)
            last = page[-1].place

    def _look(self, job_id: str, *, after: int) -> Sequence[Any]:
        chosen = (
            select(outputs.c.index.label("place"), outputs.c.error_code, outputs.c.prompt_tokens)
            .where(_is_marked(job_id), outputs.c.index > after)
            .order_by(outputs.c.index)
            .limit(_LOOK_REQUESTS)
        )
        with self._database.read() as connection:
            return connection.execute(chosen).all()

    @retried
    def _retry_page(self, job_id: str, indexes: list[int], *, keeps_model: bool = True) -> tuple[int, list[int]]:
        """Moves the first of these requests, as many as one transaction takes; returns their number and the rest.

        They are read again under the locks: another retry of the same job may have moved some meanwhile.
        """
        with self._database.write() as connection:
            seen = {row.batch_id for row in self._unsuccessful(connection, job_id, indexes)}
            self._lock(connection, seen)
            rows = self._unsuccessful(connection, job_id, indexes) if seen else []
            page = list(takewhile(lambda row: row.batch_id in seen, rows))
            if not page:
                return 0, [index for index in indexes if rows and index >= rows[0].place]
            batch_size = self._reopen(connection, job_id, keeps_model=keeps_model)
            if batch_size is None:
                return 0, []
            self._take_off(connection, page)
            moving = [row.place for row in page]
            connection.execute(delete(outputs).where(outputs.c.job_id == job_id, outputs.c.index.in_(moving)))
            for adapter in sorted({row.adapter for row in page}):
                alike = {row.place: row.size_bytes for row in page if row.adapter == adapter}
                move(connection, job_id, alike, batch_size=batch_size, adapter=adapter)
        return len(page), [index for index in indexes if index > moving[-1]]

    def _unsuccessful(self, connection: Connection, job_id: str, indexes: Sequence[int]) -> Sequence[_Moving]:
        same = and_(outputs.c.job_id == requests.c.job_id, outputs.c.index == requests.c.index)
        chosen = (
            select(
                outputs.c.index.label("place"),
                outputs.c.state,
                outputs.c.prompt_tokens,
                outputs.c.completion_tokens,
                requests.c.batch_id,
                batches.c.adapter,
            )
            .select_from(outputs.join(requests, same).join(batches, batches.c.id == requests.c.batch_id))
            .where(_is_marked(job_id), outputs.c.index.in_(indexes))
            .order_by(outputs.c.index)
        )
        return page_of(self._database, connection, chosen, size=octets(self._database, requests.c.body))

    def _lock(self, connection: Connection, batch_ids: set[int]) -> None:
        connection.execute(
            select(batches.c.id)
            .where(batches.c.id.in_(batch_ids))
            .order_by(batches.c.id)
            .with_for_update(key_share=True)
        ).all()

    def _reopen(self, connection: Connection, job_id: str, *, keeps_model: bool) -> int | None:
        """Locks and reopens the job; returns its batch size, or None when a cancel took the mark away in between."""
        row = connection.execute(
            select(jobs.c.state, jobs.c.batch_size)
            .where(jobs.c.id == job_id, jobs.c.retry_started_at.is_not(None))
            .with_for_update(key_share=True)
        ).first()
        if row is None:
            return None
        if JobState(row.state) in CLOSED_JOB_STATES:
            changes: dict[str, object] = {"state": JobState.QUEUED.value, "finished_at": None}
            if not keeps_model and not self._is_answered(connection, job_id):
                changes |= {"identity": None, "sampling": None, "adapters": None}
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(changes))
        return int(row.batch_size)

    def _is_answered(self, connection: Connection, job_id: str) -> bool:
        """True where a request of a closed job has an answer, which no other model may be mixed with."""
        answered = exists().where(batches.c.job_id == job_id, batches.c.succeeded > 0)
        return bool(connection.scalar(select(answered)))

    @retried
    def _end_retry(self, job_id: str) -> bool:
        """Takes the mark away; False where it was gone."""
        with self._database.write() as connection:
            marked = and_(jobs.c.id == job_id, jobs.c.retry_started_at.is_not(None))
            ended = update(jobs).where(marked).values(retry_started_at=None).returning(jobs.c.id)
            return connection.scalar(ended) is not None

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


def _is_unsuccessful(job_id: str) -> ColumnElement[bool]:
    return and_(outputs.c.job_id == job_id, outputs.c.state != RequestState.SUCCEEDED.value)


def _is_marked(job_id: str) -> ColumnElement[bool]:
    """Outputs that a retry of this job means: those without success that were there when it began."""
    began = select(jobs.c.retry_started_at).where(jobs.c.id == job_id).scalar_subquery()
    return and_(_is_unsuccessful(job_id), outputs.c.finished_at <= began)
