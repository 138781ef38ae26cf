"""What a job took: seconds waiting, running and loading, its present speed, and the memory of its runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, func, select

from jobs.memory import DeviceMemory, Memory, largest_of_texts
from jobs.store.database import Database
from jobs.tables import jobs, runs

#: The window over which a job's present speed is taken.
RECENT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Effort:
    """What a job's runs took. `running_seconds`: with at least one run open; rates come from these.

    `recent_requests_per_second`: of the last minute, each run's requests spread evenly over its time. `memory`: its
    bytes are those of the run that held most, and its devices those of all runs.
    """

    runs: int = 0
    queued_seconds: float = 0.0
    running_seconds: float = 0.0
    model_load_seconds: float = 0.0
    recent_requests_per_second: float = 0.0
    memory: Memory = field(default_factory=Memory)
    model_commits: tuple[str, ...] = ()


class EffortReading:
    """The sums over a job's runs; runs overlap, so that their times are united, not added."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, job_id: str) -> Effort:
        """What a job's runs took so far."""
        with self._database.read() as connection:
            now = connection.scalar(select(self._database.now)) or 0.0
            busy = self._busy(connection, job_id, now)
            if not busy.runs:
                waiting = connection.scalar(select(jobs.c.queued_at).where(jobs.c.id == job_id))
                return Effort(queued_seconds=max(0.0, now - (waiting or now)))
            memory, load_seconds, commits = self._memory(connection, job_id, self._devices(connection, job_id))
            queued_at = connection.scalar(select(jobs.c.queued_at).where(jobs.c.id == job_id)) or 0.0
        return Effort(
            runs=busy.runs,
            queued_seconds=max(0.0, busy.first - queued_at),
            running_seconds=busy.seconds,
            model_load_seconds=load_seconds,
            recent_requests_per_second=(busy.recent or 0.0) / RECENT_SECONDS,
            memory=memory,
            model_commits=commits,
        )

    def _busy(self, connection: Connection, job_id: str, now: float) -> Row[Any]:
        """The length of the union of the runs' times: each adds what lies past all that began before it."""
        ends = func.coalesce(runs.c.finished_at, now)
        before = func.max(ends).over(order_by=(runs.c.started_at, runs.c.id), rows=(None, -1))
        answered = (runs.c.succeeded + runs.c.failed) * 1.0
        each = (
            select(
                runs.c.started_at.label("began"),
                ends.label("ended"),
                func.coalesce(before, runs.c.started_at).label("covered"),
                answered.label("answered"),
            )
            .where(runs.c.job_id == job_id)
            .subquery()
        )
        begins = self._database.larger(each.c.began, each.c.covered)
        recent_begin = self._database.larger(each.c.began, now - RECENT_SECONDS)
        length = self._database.larger(each.c.ended - each.c.began, 0.001)
        return connection.execute(
            select(
                func.count().label("runs"),
                func.min(each.c.began).label("first"),
                func.sum(self._database.larger(each.c.ended - begins, 0.0)).label("seconds"),
                func.sum(each.c.answered * self._database.larger(each.c.ended - recent_begin, 0.0) / length).label(
                    "recent"
                ),
            )
        ).one()

    def _devices(self, connection: Connection, job_id: str) -> tuple[DeviceMemory, ...]:
        """The devices of a job's runs, each with the largest numbers of all of them."""
        texts = connection.scalars(
            select(runs.c.devices).where(runs.c.job_id == job_id, runs.c.devices.is_not(None)).distinct()
        ).all()
        found = largest_of_texts(texts)
        return tuple(sorted(found, key=lambda each: (each.device, each.key)))

    def _memory(
        self, connection: Connection, job_id: str, devices: tuple[DeviceMemory, ...]
    ) -> tuple[Memory, float, tuple[str, ...]]:
        most = [
            func.max(runs.c[name]).label(name)
            for name in ("weights_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "device_total_bytes")
        ]
        row = connection.execute(
            select(
                *most,
                func.max(runs.c.model_load_seconds).label("load"),
                func.sum(runs.c.energy_joules).label("joules"),
            ).where(runs.c.job_id == job_id)
        ).one()
        commits = connection.scalars(
            select(runs.c.model_commit).where(runs.c.job_id == job_id, runs.c.model_commit.is_not(None)).distinct()
        ).all()
        bytes_of = (row.weights_bytes, row.peak_allocated_bytes, row.peak_reserved_bytes, row.device_total_bytes)
        memory = Memory(*bytes_of, devices=devices, energy_joules=row.joules)
        return memory, row.load, tuple(sorted(commits))
