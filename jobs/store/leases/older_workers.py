"""Workers that are at work on a store of an older revision: once it is upgraded, they can save no answer any more.

It reads the columns that every revision has, and those of today alone where they are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import column, func, inspect, null, select, table

from batchmill.jobs.requests.states import BatchState, WorkerState
from batchmill.jobs.runtime.process.process import Lives, Process
from batchmill.jobs.store.database.database import Database

_WORKERS = table("workers", *map(column, ("id", "name", "host", "pid", "state", "process")))
_BATCHES = table("batches", *map(column, ("worker_id", "state", "lease_until")))


@dataclass(frozen=True, slots=True)
class OlderWorker:
    """One worker of an older batchmill."""

    name: str
    host: str
    pid: int
    #: The time until its last lease ends; None where it is known to live, whatever it holds.
    lease_seconds: float | None


def older_workers(database: Database) -> list[OlderWorker]:
    """The workers that live, and those of which that is unknown, as long as a lease of theirs lasts."""
    with database.read() as connection:
        has_process = any(each["name"] == "process" for each in inspect(connection).get_columns("workers"))
        its_leases = (_BATCHES.c.worker_id == _WORKERS.c.id) & (_BATCHES.c.state == BatchState.LEASED.value)
        until = select(func.max(_BATCHES.c.lease_until)).where(its_leases).correlate(_WORKERS).scalar_subquery()
        shown = (_WORKERS.c.name, _WORKERS.c.host, _WORKERS.c.pid)
        process = _WORKERS.c.process if has_process else null()
        rows: Any = connection.execute(
            select(*shown, process.label("process"), (until - database.now).label("lease_seconds"))
            .where(_WORKERS.c.state != WorkerState.STOPPED.value)
            .order_by(_WORKERS.c.id)
        ).all()
    older = []
    for row in rows:
        named = Process.parse(row.process)
        lives = Lives.UNKNOWN if named is None else named.lives()
        if lives is Lives.YES:
            older.append(OlderWorker(row.name, row.host, row.pid, None))
        elif lives is Lives.UNKNOWN and (row.lease_seconds or 0) > 0:
            older.append(OlderWorker(row.name, row.host, row.pid, row.lease_seconds))
    return older
