"""Checks a whole store and changes nothing: damage, rows that belong nowhere, counts against sums, states.

A job is checked in one short transaction for each question, so that workers go on meanwhile; every question is a
single statement and sees one state of the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    FromClause,
    Select,
    and_,
    bindparam,
    case,
    exists,
    func,
    not_,
    null,
    or_,
    select,
)

from batchmill.jobs.requests.states import CLOSED_JOB_STATES, OPEN_BATCH_STATES, BatchState, JobState, RequestState
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.tables import batches, jobs, outputs, requests, runs

#: So many findings of one kind in one job are told.
MOST_OF_A_KIND = 5
_DAMAGES = 20

_THIS: BindParameter[str] = bindparam("job_id")
_OPEN = tuple(each.value for each in OPEN_BATCH_STATES)
_COUNTS = ("succeeded", "failed", "cancelled", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong."""

    #: The check that found it: `file`, `rows`, `counts` or `states`.
    check: str
    #: None for the whole store.
    job_id: str | None
    #: A sentence about it.
    text: str


@dataclass(frozen=True, slots=True)
class _StoreCheck:
    """A query that has a row for each thing wrong in the job `job_id`, and the sentence about such a row."""

    check: str
    sentence: str
    query: Select[*tuple[Any, ...]]


def _requests_without_a_batch() -> _StoreCheck:
    theirs = exists().where(batches.c.id == requests.c.batch_id, batches.c.job_id == requests.c.job_id)
    query = select(requests.c.index, requests.c.batch_id).where(requests.c.job_id == _THIS, not_(theirs))
    return _StoreCheck("rows", "request {index} is in batch {batch_id}, which this job does not have", query)


def _outputs_without_a_request() -> _StoreCheck:
    theirs = exists().where(requests.c.job_id == outputs.c.job_id, requests.c.index == outputs.c.index)
    query = select(outputs.c.index).where(outputs.c.job_id == _THIS, not_(theirs))
    return _StoreCheck("rows", "output {index} answers no request", query)


def _runs_without_a_batch() -> _StoreCheck:
    theirs = exists().where(batches.c.id == runs.c.batch_id, batches.c.job_id == runs.c.job_id)
    query = select(runs.c.id, runs.c.batch_id).where(runs.c.job_id == _THIS, not_(theirs))
    return _StoreCheck("rows", "run {id} is of batch {batch_id}, which this job does not have", query)


def _gaps() -> _StoreCheck:
    count, first, last = (func.count(), func.min(requests.c.index), func.max(requests.c.index))
    query = (
        select(count.label("found"), first.label("first"), last.label("last"))
        .where(requests.c.job_id == _THIS)
        .having(or_(count == 0, first != 0, last != count - 1))
    )
    return _StoreCheck("rows", "it has {found} requests, numbered from {first} to {last}", query)


def _totals() -> _StoreCheck:
    members = select(func.count()).where(requests.c.batch_id == batches.c.id).correlate(batches).scalar_subquery()
    query = select(batches.c.id, batches.c.total, members.label("found")).where(
        batches.c.job_id == _THIS, batches.c.total != members
    )
    return _StoreCheck("counts", "batch {id} counts {total} requests and has {found}", query)


def _sums() -> FromClause:
    """Sums over the outputs of each batch of the job."""

    def times(state: RequestState) -> ColumnElement[int]:
        return func.sum(case((outputs.c.state == state.value, 1), else_=0)).label(state.value)

    together = and_(outputs.c.job_id == requests.c.job_id, outputs.c.index == requests.c.index)
    return (
        select(
            requests.c.batch_id,
            *map(times, (RequestState.SUCCEEDED, RequestState.FAILED, RequestState.CANCELLED)),
            func.sum(outputs.c.prompt_tokens).label("prompt_tokens"),
            func.sum(outputs.c.completion_tokens).label("completion_tokens"),
        )
        .select_from(requests.join(outputs, together))
        .where(requests.c.job_id == _THIS)
        .group_by(requests.c.batch_id)
        .subquery()
    )


def _counts_of_batches() -> Iterator[_StoreCheck]:
    for name in _COUNTS:
        sums = _sums()
        summed = func.coalesce(sums.c[name], 0)
        query = (
            select(batches.c.id, batches.c[name].label("said"), summed.label("found"))
            .select_from(batches.outerjoin(sums, sums.c.batch_id == batches.c.id))
            .where(batches.c.job_id == _THIS, batches.c[name] != summed)
        )
        what = name.replace("_", " ")
        yield _StoreCheck("counts", f"batch {{id}} counts {{said}} {what}, and its outputs add up to {{found}}", query)


def _counts_of_choices() -> _StoreCheck:
    """Every answer has at least one choice; answers from before revision 0007 have no counts."""
    choices = batches.c.stop_choices + batches.c.length_choices
    query = select(batches.c.id, batches.c.succeeded, choices.label("found")).where(
        batches.c.job_id == _THIS, choices < batches.c.succeeded
    )
    return _StoreCheck("counts", "batch {id} counts {succeeded} succeeded, and {found} choices that ended", query)


def _counts_of_runs() -> _StoreCheck:
    written = (
        select(outputs.c.run_id, func.count().label("found"))
        .where(outputs.c.job_id == _THIS, outputs.c.state == RequestState.SUCCEEDED.value)
        .group_by(outputs.c.run_id)
        .subquery()
    )
    number = func.coalesce(written.c.found, 0)
    query = (
        select(runs.c.id, runs.c.succeeded, number.label("found"))
        .select_from(runs.outerjoin(written, written.c.run_id == runs.c.id))
        .where(runs.c.job_id == _THIS, runs.c.succeeded != number)
    )
    return _StoreCheck("counts", "run {id} counts {succeeded} succeeded, and wrote {found}", query)


def _ended_batches() -> _StoreCheck:
    answered = batches.c.succeeded + batches.c.failed + batches.c.cancelled
    query = select(batches.c.id, batches.c.state, batches.c.total, answered.label("answered")).where(
        batches.c.job_id == _THIS, (batches.c.state.not_in(_OPEN)) != (answered == batches.c.total)
    )
    return _StoreCheck("states", "batch {id} is {state} with {answered} of {total} requests answered", query)


def _leases() -> _StoreCheck:
    open_runs = (
        select(func.count())
        .where(runs.c.batch_id == batches.c.id, runs.c.fence == batches.c.fence, runs.c.finished_at == null())
        .correlate(batches)
        .scalar_subquery()
    )
    wanted = case((batches.c.state == BatchState.LEASED.value, 1), else_=0)
    query = select(batches.c.id, batches.c.state, open_runs.label("found")).where(
        batches.c.job_id == _THIS, open_runs != wanted
    )
    return _StoreCheck("states", "batch {id} is {state} with {found} open runs", query)


def _state_of_job() -> _StoreCheck:
    still_open = func.coalesce(func.sum(case((batches.c.state.in_(_OPEN), 1), else_=0)), 0)
    closed = jobs.c.state.in_([each.value for each in CLOSED_JOB_STATES])
    query = (
        select(jobs.c.state, still_open.label("found"))
        .select_from(jobs.outerjoin(batches, batches.c.job_id == jobs.c.id))
        .where(jobs.c.id == _THIS)
        .group_by(jobs.c.state)
        .having(or_(and_(closed, still_open > 0), and_(jobs.c.state == JobState.QUEUED.value, still_open == 0)))
    )
    return _StoreCheck("states", "it is {state} with {found} open batches", query)


_QUESTIONS = (
    _requests_without_a_batch(),
    _outputs_without_a_request(),
    _runs_without_a_batch(),
    _gaps(),
    _totals(),
    *_counts_of_batches(),
    _counts_of_choices(),
    _counts_of_runs(),
    _ended_batches(),
    _leases(),
    _state_of_job(),
)
#: Tables whose rows belong to a job, from the smallest.
_OF_A_JOB = (batches, runs, requests, outputs)


class Checking:
    """The checks of a whole store and of each of its jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def job_ids(self) -> list[str]:
        """Every job whose file was read whole, the oldest first."""
        query = select(jobs.c.id).where(jobs.c.state != JobState.LOADING.value)
        with self._database.read() as connection:
            return list(connection.scalars(query.order_by(jobs.c.created_at, jobs.c.id)))

    def findings(self, job_ids: Iterable[str]) -> Iterator[Violation]:
        """Everything that is wrong, in the store as a whole and in these jobs."""
        yield from self._whole()
        for job_id in job_ids:
            yield from self._job(job_id)

    def _whole(self) -> Iterator[Violation]:
        """Damage of a SQLite store's file, and rows of jobs that are not there."""
        if self._database.is_sqlite:
            with self._database.read() as connection:
                rows = list(connection.exec_driver_sql(f"PRAGMA quick_check({_DAMAGES})").scalars())
            if rows != ["ok"]:
                yield from (Violation("file", None, row) for row in rows)
                return  # any further question would fail
        for table in _OF_A_JOB:
            strange = select(table.c.job_id).distinct().where(table.c.job_id.not_in(select(jobs.c.id)))
            with self._database.read() as connection:
                rows = list(connection.scalars(strange.limit(MOST_OF_A_KIND)))
            yield from (Violation("rows", None, f"{table.name} has rows of job {row}, which is gone") for row in rows)

    def _job(self, job_id: str) -> Iterator[Violation]:
        """Everything that is wrong with one job."""
        for question in _QUESTIONS:
            with self._database.read() as connection:
                rows = _violating_rows(connection, question, job_id)
            told = rows[:MOST_OF_A_KIND]
            yield from (Violation(question.check, job_id, question.sentence.format(**row)) for row in told)
            if len(rows) > len(told):
                yield Violation(question.check, job_id, "and more like the last")


def _violating_rows(connection: Connection, question: _StoreCheck, job_id: str) -> list[Any]:
    query = question.query.limit(MOST_OF_A_KIND + 1)
    return list(connection.execute(query, {"job_id": job_id}).mappings())
