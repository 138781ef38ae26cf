"""Workers as they were last seen: the live ones, and those gone of late that nobody has replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, exists, func, or_, select

from batchmill.jobs.models.adapters import Adapter, from_json
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import BatchState, WorkerState
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.tables import batches, workers
from batchmill.jobs.store.workers.liveness import alive

#: Workers and crashes of longer ago are left out.
NEWS_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class SeenWorker:
    """One worker as it was last seen."""

    id: int
    name: str
    host: str
    process: Process | None
    device: str
    state: WorkerState
    error: str | None
    spec: ModelSpec
    only_job: str | None
    identity: str | None
    adapters: tuple[Adapter, ...]
    generation: int
    started_at: float
    #: The time when its newest child began to load the model; None before its first child.
    loading_since: float | None
    seen_seconds: float
    alive: bool
    #: The number that it holds, of any job.
    batches: int


def seen_workers(
    connection: Connection, which: ColumnElement[bool], *, now: ColumnElement[float], most: int | None = None
) -> tuple[SeenWorker, ...]:
    """The workers of this condition, the last seen first; at most `most`."""
    held = (
        select(func.count())
        .where(batches.c.worker_id == workers.c.id, batches.c.state == BatchState.LEASED.value)
        .scalar_subquery()
    )
    rows: Sequence[Any] = connection.execute(
        select(
            workers,
            alive(now).label("alive"),
            (now - workers.c.heartbeat_at).label("seen_seconds"),
            held.label("batches"),
        )
        .where(which)
        .order_by(workers.c.heartbeat_at.desc(), workers.c.id.desc())
        .limit(most)
    ).all()
    return tuple(_seen(row) for row in rows)


def serving(spec: str, job_id: str, *, now: ColumnElement[float]) -> ColumnElement[bool]:
    """Live workers of a spec, also those bound to other jobs, and those gone of late that nobody has replaced."""
    newer = workers.alias("newer")
    replaced = exists().where(
        newer.c.spec == workers.c.spec,
        newer.c.host == workers.c.host,
        newer.c.device == workers.c.device,
        newer.c.id > workers.c.id,
    )
    bound_here = or_(workers.c.only_job.is_(None), workers.c.only_job == job_id)
    gone = and_(workers.c.heartbeat_at > now - NEWS_SECONDS, bound_here, ~replaced)
    return and_(workers.c.spec == spec, or_(alive(now), gone))


def _seen(row: Row[Any]) -> SeenWorker:
    return SeenWorker(
        id=row.id,
        name=row.name,
        host=row.host,
        process=Process.parse(row.process),
        device=row.device,
        state=WorkerState(row.state),
        error=row.error,
        spec=ModelSpec.from_canonical(row.spec),
        only_job=row.only_job,
        identity=row.identity,
        adapters=from_json(row.adapters),
        generation=row.generation,
        started_at=row.started_at,
        loading_since=row.loading_since,
        seen_seconds=row.seen_seconds,
        alive=bool(row.alive),
        batches=row.batches,
    )
