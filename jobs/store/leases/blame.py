"""Blame for the death of a worker's process: the requests that were in flight run apart, in ever smaller groups.

A crash does not tell which request caused it, so all that were in flight are suspects: they move to new batches of at
most 16, which run alone on a worker; those of a group that crashes, too, move to groups of 4, then run one by one.
A request that crashes its worker twice alone is poison, and ends as that error. An answer clears a suspect.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, select, update

from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.requests.states import BATCH_BEFORE, BatchState, RequestState
from batchmill.jobs.store.bounds import octets
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.jobs.close import end_unanswered
from batchmill.jobs.store.jobs.rebatch import move
from batchmill.jobs.store.tables import NO_LEASE, batches, outputs, requests, runs

#: The largest group of a suspect after its first crash, its second and so on. One more crash is its last.
SUSPECT_GROUPS = (16, 4, 1, 1)
_POISON_MESSAGE = (
    f"the worker's process died {len(SUSPECT_GROUPS) + 1} times with this request in flight, the last two times "
    "with it alone; look at the worker's log, and run it again by `batchmill retry` once that is mended"
)


@dataclass(frozen=True, slots=True)
class _Crashed:
    """One batch of a dead process: its row, its open run, and its suspects, {index: bytes of the body}."""

    batch: Any
    run_id: int
    suspects: dict[int, int]


class Blaming:
    """A step inside the transaction that takes a dead process's batches back; it closes no job."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def blame(self, connection: Connection, batch_id: int) -> str | None:
        """Moves the suspects of a locked, leased batch away; returns the id of its job if requests ended as poison.

        The rest of the batch is pending again, or done when nothing is left.
        """
        crashed = self._crashed(connection, batch_id)
        poisoned = crashed is not None and self._punish(connection, crashed)
        done = batches.c.succeeded + batches.c.failed + batches.c.cancelled == batches.c.total
        leased = and_(batches.c.id == batch_id, batches.c.state.in_(BATCH_BEFORE[BatchState.PENDING]))
        for which, state in ((done, BatchState.DONE), (~done, BatchState.PENDING)):
            connection.execute(update(batches).where(leased, which).values(state=state.value, **NO_LEASE))
        return crashed.batch.job_id if crashed is not None and poisoned else None

    def _crashed(self, connection: Connection, batch_id: int) -> _Crashed | None:
        """The batch with its suspects; None when nothing of it was in flight."""
        batch = connection.execute(
            select(batches.c.id, batches.c.job_id, batches.c.crashes, batches.c.worker_id, batches.c.adapter).where(
                batches.c.id == batch_id
            )
        ).one()
        run = connection.execute(
            select(runs.c.id, runs.c.in_flight).where(runs.c.batch_id == batch_id, runs.c.finished_at.is_(None))
        ).first()
        if run is None:
            return None
        answered = and_(outputs.c.job_id == requests.c.job_id, outputs.c.index == requests.c.index)
        unanswered = connection.execute(
            select(requests.c.index, octets(self._database, requests.c.body))
            .select_from(requests.outerjoin(outputs, answered))
            .where(requests.c.batch_id == batch_id, outputs.c.index.is_(None))
            .order_by(requests.c.index)
        ).all()
        in_flight = set(json.loads(run.in_flight))
        suspects = {index: size for index, size in unanswered if index in in_flight}
        return _Crashed(batch, run.id, suspects) if suspects else None

    def _punish(self, connection: Connection, crashed: _Crashed) -> bool:
        """Moves the suspects into smaller groups, or ends them; True where they were ended."""
        batch, suspects = crashed.batch, crashed.suspects
        if batch.crashes >= len(SUSPECT_GROUPS):
            self._end(connection, crashed)
            return True
        move(
            connection,
            batch.job_id,
            suspects,
            batch_size=SUSPECT_GROUPS[batch.crashes],
            adapter=batch.adapter,
            crashes=batch.crashes + 1,
            crashed_by=batch.worker_id,
        )
        connection.execute(
            update(batches).where(batches.c.id == batch.id).values(total=batches.c.total - len(suspects))
        )
        return False

    def _end(self, connection: Connection, crashed: _Crashed) -> None:
        which = and_(requests.c.batch_id == crashed.batch.id, requests.c.index.in_(list(crashed.suspects)))
        end_unanswered(
            self._database,
            connection,
            which,
            state=RequestState.FAILED,
            code=ErrorCode.POISON,
            message=_POISON_MESSAGE,
            run_id=crashed.run_id,
        )
        count = len(crashed.suspects)
        codes = json.dumps({ErrorCode.POISON.value: count})
        connection.execute(
            update(batches).where(batches.c.id == crashed.batch.id).values(failed=batches.c.failed + count)
        )
        connection.execute(
            update(runs).where(runs.c.id == crashed.run_id).values(failed=runs.c.failed + count, error_codes=codes)
        )
