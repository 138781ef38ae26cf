"""The usage of a job: seconds waiting, running and loading, its speed, by worker too, and the memory of its runs.

Read from runs, which are few where outputs are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Subquery, case, func, literal, or_, select

from batchmill.jobs.models.device_memory import DeviceMemory, Memory, largest_of_texts
from batchmill.jobs.requests.states import RunOutcome
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.tables import jobs, runs, workers
from batchmill.jobs.store.workers.liveness import MISSED_HEARTBEATS, alive

#: The window over which a job's present speed is taken.
RECENT_SECONDS = 60.0
#: An estimate goes by the last quarter of a job's time: long enough to be steady, and it forgets the machine's earlier
#: speed as the job goes on.
LATE_PART = 0.25
LEAST_LATE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Pace:
    """The work of one worker on a job; tokens are those of answered requests."""

    worker_id: int
    #: Seconds in which at least one of its runs was worked on.
    seconds: float
    succeeded: int
    prompt_tokens: int
    completion_tokens: int
    #: Tokens of answers on their way.
    in_flight_tokens: int = 0
    #: Worked seconds of the job's last quarter.
    late_seconds: float = 0.0
    #: Tokens of both kinds in `late_seconds`, each run's spread evenly over its time.
    late_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """The time, the speed and the memory of a job's runs."""

    runs: int = 0
    queued_seconds: float = 0.0
    #: Seconds in which at least one run was worked on; rates come from these.
    running_seconds: float = 0.0
    model_load_seconds: float = 0.0
    #: Queued seconds in which the worker that began the job imported torch; 0 where it had before, or is not known.
    torch_wait_seconds: float = 0.0
    #: Queued seconds in which that worker loaded the model; 0 in the same cases.
    model_wait_seconds: float = 0.0
    #: Answers of the last minute in its worked seconds, each run's spread evenly over its time.
    recent_requests_per_second: float = 0.0
    #: Bytes of the run that held most, and the devices of all runs.
    memory: Memory = field(default_factory=Memory)
    model_commits: tuple[str, ...] = ()
    paces: tuple[Pace, ...] = ()


#: The outcomes of runs that their worker itself ended.
_SAID = (RunOutcome.DONE.value, RunOutcome.RELEASED.value, RunOutcome.CANCELLED.value)


class UsageView:
    """The sums over a job's runs; runs overlap, so that their times are united, not added."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, job_id: str) -> Usage:
        """The usage of a job so far."""
        with self._database.read() as connection:
            now = connection.scalar(select(self._database.now)) or 0.0
            first = _first_run(connection, job_id)
            if first is None:
                ended = func.coalesce(jobs.c.finished_at, now)
                waited = connection.scalar(select(ended - jobs.c.queued_at).where(jobs.c.id == job_id))
                return Usage(queued_seconds=max(0.0, waited or 0.0))
            busy = self._busy(connection, job_id, began=first.started_at, now=now)
            memory, load_seconds, commits = self._memory(connection, job_id, self._devices(connection, job_id))
            queued_at = connection.scalar(select(jobs.c.queued_at).where(jobs.c.id == job_id)) or 0.0
        torch_wait_seconds, model_wait_seconds = _waited_for(first, queued_at)
        recent_seconds = sum(each.recent_seconds for each in busy)
        return Usage(
            runs=sum(each.runs for each in busy),
            queued_seconds=max(0.0, first.started_at - queued_at),
            running_seconds=sum(each.seconds for each in busy),
            model_load_seconds=load_seconds,
            torch_wait_seconds=torch_wait_seconds,
            model_wait_seconds=model_wait_seconds,
            recent_requests_per_second=sum(each.recent for each in busy) / recent_seconds if recent_seconds else 0.0,
            memory=memory,
            model_commits=commits,
            paces=tuple(map(_pace, busy)),
        )

    def _busy(self, connection: Connection, job_id: str, *, began: float, now: float) -> Sequence[Row[Any]]:
        """Sums over the runs, a row a worker.

        `seconds` are those of the union of all runs, of which each adds what lies past all that began before it;
        `own_seconds` those of the union of the worker's own.
        """
        larger = self._database.larger
        ended = self._ended(now)
        sums = ("succeeded", "prompt_tokens", "completion_tokens", "in_flight_tokens")
        each = (
            select(
                runs.c.worker_id,
                runs.c.started_at.label("began"),
                ended.label("ended"),
                _covered(ended).label("covered"),
                _covered(ended, runs.c.worker_id).label("own_covered"),
                *(runs.c[name] for name in sums),
            )
            .join_from(runs, workers, workers.c.id == runs.c.worker_id)
            .where(runs.c.job_id == job_id)
            .subquery()
        )
        begins, own_begins = (larger(each.c.began, covered) for covered in (each.c.covered, each.c.own_covered))
        tokens = each.c.completion_tokens + each.c.in_flight_tokens
        recent, late = now - RECENT_SECONDS, late_since(began, now)
        recent_part, late_part = (
            self._past(each, larger(each.c.began, since)) / larger(each.c.ended - each.c.began, 0.001)
            for since in (recent, late)
        )
        rows = connection.execute(
            select(
                each.c.worker_id,
                func.count().label("runs"),
                func.sum(self._past(each, begins)).label("seconds"),
                func.sum(self._past(each, own_begins)).label("own_seconds"),
                func.sum(self._past(each, larger(own_begins, late))).label("late_seconds"),
                func.sum(tokens * late_part).label("late_tokens"),
                func.sum(self._past(each, larger(begins, recent))).label("recent_seconds"),
                func.sum(each.c.succeeded * recent_part).label("recent"),
                *(func.sum(each.c[name]).label(name) for name in sums),
            )
            .group_by(each.c.worker_id)
            .order_by(each.c.worker_id)
        )
        return rows.all()

    def _past(self, each: Subquery, begin: ColumnElement[float]) -> ColumnElement[float]:
        """The seconds of a run after this."""
        return self._database.larger(each.c.ended - begin, 0.0)

    def _ended(self, now: float) -> ColumnElement[float]:
        """The time of a run's last work: leases outlive a dead worker, which died before its next heartbeat."""
        ended = func.coalesce(runs.c.finished_at, now)
        beat = (workers.c.alive_until - workers.c.heartbeat_at) / MISSED_HEARTBEATS
        died = self._database.larger(runs.c.started_at, workers.c.heartbeat_at + beat)
        is_known = or_(runs.c.outcome.in_(_SAID), alive(literal(now)), ended < died)
        return case((is_known, ended), else_=died)

    def _devices(self, connection: Connection, job_id: str) -> tuple[DeviceMemory, ...]:
        """The devices of a job's runs, each with the largest numbers of all of them."""
        texts = connection.scalars(
            select(runs.c.devices).where(runs.c.job_id == job_id, runs.c.devices.is_not(None)).distinct()
        ).all()
        devices = largest_of_texts(texts)
        return tuple(sorted(devices, key=lambda each: (each.device, each.key)))

    def _memory(
        self, connection: Connection, job_id: str, devices: tuple[DeviceMemory, ...]
    ) -> tuple[Memory, float, tuple[str, ...]]:
        largest = [
            func.max(runs.c[name]).label(name)
            for name in ("weights_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "device_total_bytes")
        ]
        row = connection.execute(
            select(
                *largest,
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


def late_since(began: float, now: float) -> float:
    """The beginning of the last quarter of a job that began then."""
    return now - max(LEAST_LATE_SECONDS, LATE_PART * (now - began))


def _first_run(connection: Connection, job_id: str) -> Row[Any] | None:
    """The beginning of a job's first run, and how its worker loaded; None where it has no run."""
    rows: Sequence[Any] = connection.execute(
        select(runs.c.started_at, runs.c.loading_since, runs.c.torch_load_seconds, runs.c.model_load_seconds)
        .where(runs.c.job_id == job_id)
        .order_by(runs.c.started_at, runs.c.id)
        .limit(1)
    ).all()
    return rows[0] if rows else None


def _waited_for(first: Row[Any], queued_at: float) -> tuple[float, float]:
    """The seconds between a job's queueing and its first run in which the run's worker loaded torch, and the model."""
    if first.loading_since is None or first.torch_load_seconds is None:
        return 0.0, 0.0
    imported = first.loading_since + first.torch_load_seconds
    spans = ((first.loading_since, imported), (imported, imported + first.model_load_seconds))
    torch, model = (max(0.0, min(end, first.started_at) - max(begin, queued_at)) for begin, end in spans)
    return torch, model


def _covered(ended: ColumnElement[float], *by: ColumnElement[Any]) -> ColumnElement[float]:
    """The latest end of the runs that began before each."""
    before = func.max(ended).over(partition_by=by, order_by=(runs.c.started_at, runs.c.id), rows=(None, -1))
    return func.coalesce(before, runs.c.started_at)


def _pace(row: Row[Any]) -> Pace:
    tokens = (int(row.prompt_tokens), int(row.completion_tokens), int(row.in_flight_tokens))
    return Pace(row.worker_id, row.own_seconds, int(row.succeeded), *tokens, row.late_seconds, row.late_tokens)
