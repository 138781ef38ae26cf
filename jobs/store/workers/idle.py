"""Idle workers: those that are ready for a batch and hold none."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, exists, func, or_, select

from batchmill.jobs.models.adapters import from_json
from batchmill.jobs.requests.states import BatchState, WorkerState
from batchmill.jobs.store.tables import batches, workers
from batchmill.jobs.store.workers.liveness import alive


def idle_workers(
    connection: Connection,
    *,
    spec: str,
    identity: str,
    kinds: frozenset[str],
    job_id: str | None,
    other_than: int,
    now: ColumnElement[float],
) -> dict[frozenset[str], int]:
    """The number of other live workers of this very model that are ready and hold no batch, by the adapters they hold.

    `kinds`: those that the asking worker's engine serves; workers that serve less do not count. `job_id`: the one job
    that it serves; workers bound to another job do not count.
    """
    holds = exists().where(batches.c.worker_id == workers.c.id, batches.c.state == BatchState.LEASED.value)
    bound: ColumnElement[bool] = workers.c.only_job.is_(None)
    if job_id is not None:
        bound = or_(bound, workers.c.only_job == job_id)
    counted: Sequence[Any] = connection.execute(
        select(workers.c.adapters, workers.c.kinds, func.count().label("workers"))
        .where(workers.c.spec == spec, workers.c.identity == identity, workers.c.id != other_than, bound)
        .where(workers.c.state == WorkerState.READY.value, alive(now), ~holds)
        .group_by(workers.c.adapters, workers.c.kinds)
    ).all()
    idle: Counter[frozenset[str]] = Counter()
    for row in counted:  # equal names may be spelled with different meanings
        if not kinds.issubset(json.loads(row.kinds)):
            continue
        idle[frozenset(each.name for each in from_json(row.adapters))] += row.workers
    return idle
