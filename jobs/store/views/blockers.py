"""Blockers of a job: the workers that hold its batches, what waits, and the workers that could take it.

It changes nothing. All of it is one short transaction, so that the parts agree; their meaning is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, case, func, or_, select

from batchmill.jobs.errors import NotFound
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import CLAIMABLE_JOB_STATES, BatchState, JobState, RunOutcome
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.database.clock import is_over
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.tables import batches, jobs, outputs, requests, runs, workers
from batchmill.jobs.store.views.missing_adapters import MissingAdapter, lacks
from batchmill.jobs.store.views.seen_workers import NEWS_SECONDS, SeenWorker, seen_workers, serving
from batchmill.jobs.store.workers.liveness import GIVEN_UP, alive

_MOST_OLDER_JOBS = 3
_MOST_CRASHES = 5
_MOST_OTHERS = 500


@dataclass(frozen=True, slots=True)
class Hold:
    """The batches of a job that one worker holds."""

    worker: SeenWorker
    batches: int
    #: The beginning of the oldest run.
    since: float
    #: The end of the first lease.
    lease_until: float
    #: The number of leases that are over.
    expired: int


@dataclass(frozen=True, slots=True)
class Pending:
    """A job's pending batches."""

    batches: int
    #: The adapters that they need, NO_ADAPTER among them where some need none.
    needs: frozenset[str]
    #: Those that run apart.
    suspects: int
    #: The open requests of those.
    suspect_requests: int
    #: The time since which the next one could be claimed.
    waits_since: float | None


@dataclass(frozen=True, slots=True)
class Crashes:
    """Deaths of a worker's processes, or leases that they let expire, while they held batches of a job."""

    worker: SeenWorker
    outcome: RunOutcome
    times: int
    last_at: float


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Everything around one job at one moment."""

    #: Seconds since 1970, UTC.
    now: float
    holds: tuple[Hold, ...]
    pending: Pending
    #: Jobs that go first, with their pending batches.
    older: tuple[tuple[str, int], ...]
    crashes: tuple[Crashes, ...]
    #: Workers of its ModelSpec, the last seen first.
    serving: tuple[SeenWorker, ...]
    #: Live workers of the same model held differently.
    others: tuple[SeenWorker, ...]
    #: The process of each live worker, of any ModelSpec, None where it told none; each of them reconciles.
    live: tuple[Process | None, ...]
    last_answer_at: float | None

    @property
    def live_workers(self) -> int:
        return len(self.live)


class Blockers:
    """Looks around jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def around(self, job_id: str, *, lease_seconds: float) -> Surroundings:
        """Everything around a job. Raises NotFound."""
        with self._database.read() as connection:
            job: Any = connection.execute(
                select(jobs.c.id, jobs.c.spec, jobs.c.queued_at).where(
                    jobs.c.id == job_id, jobs.c.state != JobState.LOADING.value
                )
            ).first()
            if job is None:
                raise NotFound(f"there is no job {job_id}; `batchmill jobs` lists them")
            now = self._database.now
            return Surroundings(
                now=connection.scalar(select(now)) or 0.0,
                holds=self._holds(connection, job_id, lease_seconds),
                pending=_pending(connection, job),
                older=_older(connection, job),
                crashes=self._crashes(connection, job_id),
                serving=seen_workers(connection, serving(job.spec, job_id, now=now), now=now),
                others=self._others(connection, ModelSpec.from_canonical(job.spec)),
                live=tuple(map(Process.parse, connection.scalars(select(workers.c.process).where(alive(now))))),
                last_answer_at=_last_answer(connection, job_id),
            )

    def lacks(self, job_id: str) -> tuple[MissingAdapter, ...]:
        """The adapters that pending batches of a job need and no live worker holds that may take it."""
        with self._database.read() as connection:
            return lacks(connection, job_id, now=self._database.now)

    def given_up(self, spec: ModelSpec, *, job_id: str) -> tuple[SeenWorker, ...]:
        """Workers of a spec that are sick or failed and were not started again since, the last seen first."""
        which = and_(serving(spec.canonical, job_id, now=self._database.now), workers.c.state.in_(GIVEN_UP))
        with self._database.read() as connection:
            return seen_workers(connection, which, now=self._database.now)

    def _others(self, connection: Connection, spec: ModelSpec) -> tuple[SeenWorker, ...]:
        """Live workers of another spec whose model has the same last name."""
        live = and_(alive(self._database.now), workers.c.spec != spec.canonical)
        live_workers = seen_workers(connection, live, now=self._database.now, most=_MOST_OTHERS)
        return tuple(each for each in live_workers if _last_name(each.spec) == _last_name(spec))

    def _by_id(self, connection: Connection, ids: Sequence[int]) -> dict[int, SeenWorker]:
        which = workers.c.id.in_(ids)
        return {each.id: each for each in seen_workers(connection, which, now=self._database.now)}

    def _holds(self, connection: Connection, job_id: str, lease_seconds: float) -> tuple[Hold, ...]:
        its_run = and_(runs.c.batch_id == batches.c.id, runs.c.fence == batches.c.fence)
        over = is_over(batches.c.lease_until, now=self._database.now, lease_seconds=lease_seconds)
        late = case((over, 1), else_=0)
        rows = connection.execute(
            select(
                batches.c.worker_id,
                func.count().label("batches"),
                func.min(runs.c.started_at).label("since"),
                func.min(batches.c.lease_until).label("lease_until"),
                func.sum(late).label("expired"),
            )
            .select_from(batches.join(runs, its_run))
            .where(batches.c.job_id == job_id, batches.c.state == BatchState.LEASED.value)
            .group_by(batches.c.worker_id)
            .order_by(batches.c.worker_id)
        ).all()
        who = self._by_id(connection, [row.worker_id for row in rows])
        return tuple(
            Hold(who[row.worker_id], row.batches, row.since, row.lease_until, int(row.expired)) for row in rows
        )

    def _crashes(self, connection: Connection, job_id: str) -> tuple[Crashes, ...]:
        """One process may have held several batches, so its deaths are counted by its generations."""
        last_at = func.max(runs.c.finished_at).label("last_at")
        rows = connection.execute(
            select(
                runs.c.worker_id,
                runs.c.outcome,
                func.count(runs.c.worker_generation.distinct()).label("times"),
                last_at,
            )
            .where(runs.c.job_id == job_id, runs.c.finished_at > self._database.now - NEWS_SECONDS)
            .where(runs.c.outcome.in_([RunOutcome.CRASHED.value, RunOutcome.EXPIRED.value]))
            .group_by(runs.c.worker_id, runs.c.outcome)
            .order_by(last_at.desc())
            .limit(_MOST_CRASHES)
        ).all()
        who = self._by_id(connection, [row.worker_id for row in rows])
        return tuple(Crashes(who[row.worker_id], RunOutcome(row.outcome), row.times, row.last_at) for row in rows)


def _pending(connection: Connection, job: Row[Any]) -> Pending:
    suspect = batches.c.crashes > 0
    open_requests = batches.c.total - batches.c.succeeded - batches.c.failed - batches.c.cancelled
    mine = and_(batches.c.job_id == job.id, batches.c.state == BatchState.PENDING.value)
    row = connection.execute(
        select(
            func.count().label("batches"),
            func.coalesce(func.sum(case((suspect, 1), else_=0)), 0).label("suspects"),
            func.coalesce(func.sum(case((suspect, open_requests), else_=0)), 0).label("suspect_requests"),
            func.min(batches.c.id).label("next"),
        ).where(mine)
    ).one()
    tried_at = connection.scalar(select(func.max(runs.c.finished_at)).where(runs.c.batch_id == row.next))
    waits_since = None if row.next is None else max(tried_at or 0.0, job.queued_at)
    needs = frozenset(connection.scalars(select(batches.c.adapter).where(mine).distinct()).all())
    return Pending(row.batches, needs, int(row.suspects), int(row.suspect_requests), waits_since)


def _older(connection: Connection, job: Row[Any]) -> tuple[tuple[str, int], ...]:
    """The jobs of the same queue that workers claim from before they come to this one."""
    before = or_(jobs.c.queued_at < job.queued_at, and_(jobs.c.queued_at == job.queued_at, jobs.c.id < job.id))
    rows = connection.execute(
        select(jobs.c.id, func.count().label("pending"))
        .select_from(jobs.join(batches, batches.c.job_id == jobs.c.id))
        .where(jobs.c.spec == job.spec, jobs.c.state.in_(CLAIMABLE_JOB_STATES), before)
        .where(batches.c.state == BatchState.PENDING.value)
        .group_by(jobs.c.id, jobs.c.queued_at)
        .order_by(jobs.c.queued_at, jobs.c.id)
        .limit(_MOST_OLDER_JOBS)
    ).all()
    return tuple((row.id, row.pending) for row in rows)


def _last_answer(connection: Connection, job_id: str) -> float | None:
    """The time of the last answer: in a batch that is held, or at the end of a run that brought some."""
    answered = and_(outputs.c.job_id == requests.c.job_id, outputs.c.index == requests.c.index)
    held = connection.scalar(
        select(func.max(outputs.c.finished_at))
        .select_from(batches.join(requests, requests.c.batch_id == batches.c.id).join(outputs, answered))
        .where(batches.c.job_id == job_id, batches.c.state == BatchState.LEASED.value)
    )
    done = connection.scalar(
        select(func.max(runs.c.finished_at)).where(runs.c.job_id == job_id, runs.c.outcome == RunOutcome.DONE.value)
    )
    return max((each for each in (held, done) if each is not None), default=None)


def _last_name(spec: ModelSpec) -> str:
    """`Llama-3` of `org/llama-3` and of `/models/Llama-3`, in small letters."""
    return spec.model.rstrip("/").rsplit("/", 1)[-1].casefold()
