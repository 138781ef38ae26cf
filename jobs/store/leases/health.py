"""The health of a worker's device: whether crashes are its fault, and the capacity that it was last found to have.

A bad prompt crashes one worker after the other and leaves its neighbours alone; a broken device crashes whatever
it is given while other workers go on. Once that is plain, the prompts are acquitted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, and_, exists, or_, select, text, update

from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import BatchState, RunOutcome, WorkerState
from batchmill.jobs.store.database.conflicts import retried
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.tables import batches, capacities, jobs, runs, workers

#: So many crashes in a row, each of other requests, make a device suspect.
CRASHES = 3
#: Spelled as in the index of these runs, to the letter.
_CRASHED = text(f"runs.outcome = '{RunOutcome.CRASHED.value}'")
WINDOW_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class _Crash:
    """One death of a worker's process."""

    at: float
    generation: int
    #: The newest of the runs that it ended.
    last_run: int
    #: The requests in flight, by job and index.
    in_flight: frozenset[tuple[str, int]]


class Health:
    """Sickness of workers, and capacity of devices."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def is_sick(self, worker_id: int) -> bool:
        """True where three different sets of requests in a row crashed this worker while others succeeded.

        It answered nothing between them, no other worker of its ModelSpec crashed, and another one answered.
        """
        with self._database.read() as connection:
            crashes = self._crashes(connection, worker_id)[-CRASHES:]
            if len(crashes) < CRASHES or not _are_different(crashes) or _answered(connection, worker_id, crashes):
                return False
            return self._others_succeed(connection, worker_id, since=crashes[0].at)

    @retried
    def enter_sick(self, worker_id: int, *, reason: str) -> None:
        """Marks the worker as sick, and takes one crash off its suspects that nobody has claimed since."""
        with self._database.write() as connection:
            connection.execute(
                update(batches)
                .where(batches.c.crashed_by == worker_id, batches.c.state == BatchState.PENDING.value)
                .values(crashes=batches.c.crashes - 1, crashed_by=None)
            )
            connection.execute(
                update(workers).where(workers.c.id == worker_id).values(state=WorkerState.SICK.value, error=reason)
            )

    def known_capacity(self, spec: ModelSpec, device: str) -> int | None:
        """The capacity last found of a device for a ModelSpec, in the engine's unit; None if all fitted."""
        with self._database.read() as connection:
            return connection.scalar(
                select(capacities.c.fits).where(capacities.c.spec == spec.canonical, capacities.c.device == device)
            )

    @retried
    def remember_capacity(self, spec: ModelSpec, device: str, capacity: int) -> None:
        """Keeps the capacity that the device was found to have when its memory ran out."""
        values = {"fits": capacity, "found_at": self._database.now}
        row = self._database.insert(capacities).values(spec=spec.canonical, device=device, **values)
        with self._database.write() as connection:
            connection.execute(row.on_conflict_do_update(index_elements=["spec", "device"], set_=values))

    def _crashes(self, connection: Connection, worker_id: int) -> list[_Crash]:
        """The last crashes of a worker, each the runs of one of its processes, oldest first."""
        rows = connection.execute(
            select(runs.c.id, runs.c.worker_generation, runs.c.job_id, runs.c.in_flight, runs.c.finished_at)
            .where(runs.c.worker_id == worker_id, _CRASHED)
            .where(runs.c.finished_at > self._database.now - WINDOW_SECONDS)
            .order_by(runs.c.worker_generation, runs.c.id)
        ).all()
        crashes: list[_Crash] = []
        for generation in dict.fromkeys(row.worker_generation for row in rows):
            mine = [row for row in rows if row.worker_generation == generation]
            in_flight = frozenset((row.job_id, index) for row in mine for index in json.loads(row.in_flight))
            if in_flight:
                crashes.append(_Crash(max(row.finished_at for row in mine), generation, mine[-1].id, in_flight))
        return crashes

    def _others_succeed(self, connection: Connection, worker_id: int, *, since: float) -> bool:
        spec = select(workers.c.spec).where(workers.c.id == worker_id).scalar_subquery()
        others = and_(
            runs.c.job_id == jobs.c.id,
            jobs.c.spec == spec,
            runs.c.worker_id != worker_id,
            or_(runs.c.finished_at.is_(None), runs.c.finished_at > since),
        )
        crashed = runs.c.outcome.in_([RunOutcome.CRASHED.value, RunOutcome.EXPIRED.value])
        succeeded = connection.scalar(select(exists().where(others, runs.c.succeeded > 0)))
        return bool(succeeded) and not connection.scalar(select(exists().where(others, crashed)))


def _answered(connection: Connection, worker_id: int, crashes: Sequence[_Crash]) -> bool:
    """True where a process that crashed after the first of these had answered something; earlier runs are not read."""
    first, *later = crashes
    of_later = and_(
        runs.c.id > first.last_run,
        runs.c.worker_id == worker_id,
        runs.c.worker_generation.in_([each.generation for each in later]),
    )
    return bool(connection.scalar(select(exists().where(of_later, runs.c.succeeded > 0))))


def _are_different(crashes: Sequence[_Crash]) -> bool:
    """True where no request was in flight in two of these crashes."""
    together = frozenset().union(*(each.in_flight for each in crashes))
    return len(together) == sum(len(each.in_flight) for each in crashes)
