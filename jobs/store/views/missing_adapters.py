"""Missing adapters: pending batches of a job need them, and no live worker holds them. It changes nothing."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, func, or_, select

from batchmill.jobs.models.adapters import SOMEWHERE, Adapter, from_json
from batchmill.jobs.requests.states import BatchState, WorkerState
from batchmill.jobs.store.tables import NO_ADAPTER, batches, jobs, workers
from batchmill.jobs.store.workers.liveness import alive


@dataclass(frozen=True, slots=True)
class MissingAdapter:
    """An adapter that pending batches of a job need, and that no worker holds that may take the job."""

    name: str
    #: The number of pending batches that need it.
    batches: int
    #: The meaning of its name to the job, if outputs were begun with it.
    meant: Adapter | None = None
    #: Live workers, as `name on host`, that hold another adapter by this name.
    held_otherwise: tuple[tuple[str, Adapter], ...] = ()

    @property
    def changed(self) -> bool:
        """True where another one lies by now where the job's adapter lay."""
        return self.meant is not None and self.meant.where in {each.where for _, each in self.held_otherwise}

    @property
    def wanted(self) -> str:
        """The argument of `--adapter`, with a placeholder for what only the user knows."""
        return f"{self.name}={SOMEWHERE}" if self.meant is None else str(self.meant)


def lacks(connection: Connection, job_id: str, *, now: ColumnElement[float]) -> tuple[MissingAdapter, ...]:
    """The adapters that a job lacks, by name."""
    needed = connection.execute(
        select(batches.c.adapter, func.count().label("batches"))
        .where(batches.c.job_id == job_id, batches.c.state == BatchState.PENDING.value)
        .where(batches.c.adapter > NO_ADAPTER)
        .group_by(batches.c.adapter)
        .order_by(batches.c.adapter)
    ).all()
    if not needed:
        return ()
    job = connection.execute(select(jobs.c.spec, jobs.c.adapters).where(jobs.c.id == job_id)).one()
    meant = {each.name: each for each in from_json(job.adapters)}
    held = _held(connection, job.spec, job_id, now)
    missing = []
    for row in needed:
        mine, theirs = meant.get(row.adapter), held[row.adapter]
        if any((mine or each).agrees_with(each) for _, each in theirs):
            continue
        missing.append(MissingAdapter(row.adapter, row.batches, mine, tuple(theirs)))
    return tuple(missing)


def _held(
    connection: Connection, spec: str, job_id: str, now: ColumnElement[float]
) -> defaultdict[str, list[tuple[str, Adapter]]]:
    """The adapters of live workers that may take a job and are not ending, by name, and who holds them."""
    rows = connection.execute(
        select(workers.c.name, workers.c.host, workers.c.adapters)
        .where(workers.c.spec == spec, workers.c.adapters.is_not(None), alive(now))
        .where(or_(workers.c.only_job.is_(None), workers.c.only_job == job_id))
        .where(workers.c.state != WorkerState.DRAINING.value)
        .order_by(workers.c.id)
    ).all()
    held: defaultdict[str, list[tuple[str, Adapter]]] = defaultdict(list)
    for row in rows:
        for each in from_json(row.adapters):
            held[each.name].append((f"{row.name} on {row.host}", each))
    return held
