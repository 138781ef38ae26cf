"""Answers about workers: their rows, and which models they have held. Nothing here writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, case, exists, func, select

from batchmill.jobs.models.adapters import Adapter, from_json
from batchmill.jobs.models.device_memory import DeviceMemory, devices_from_text
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import BatchState, WorkerState
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.tables import batches, workers
from batchmill.jobs.store.workers.liveness import GIVEN_UP, alive


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker as the store has it.

    The engine and its limits are those of its newest child that held the model; None before.
    """

    id: int
    name: str
    host: str
    pid: int
    process: Process | None
    state: WorkerState
    error: str | None
    spec: ModelSpec
    only_job: str | None
    #: The content of the model that its child holds; None while it loads.
    identity: str | None
    device: str
    device_name: str | None
    device_uuid: str | None
    #: Seconds that its newest child took to import torch, None before.
    torch_load_seconds: float | None
    #: Seconds for which that child has been loading, None once it holds its model.
    loading_seconds: float | None
    model_load_seconds: float | None
    weights_bytes: int
    engine: str | None
    engine_rows: int | None
    context_tokens: int | None
    cache_tokens: int | None
    alive: bool
    #: Seconds since its last heartbeat.
    seen_seconds: float
    uptime_seconds: float
    #: The number of batches that it holds.
    leases: int
    generation: int
    adapters: tuple[Adapter, ...]
    #: The most that each held since that child began, and what all processes held there at the last look.
    devices: tuple[DeviceMemory, ...]

    @property
    def is_loading(self) -> bool:
        """True for one that does not hold its model yet."""
        return self.state in (WorkerState.STARTING, WorkerState.LOADING)


class WorkerView:
    """The rows of workers; a row is one life of one worker's parent process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def gave_up(self, *, host: str, pid: int, process: Process | None = None) -> WorkerState | None:
        """FAILED or SICK if the newest worker of this process gave up, else None.

        `process`: tells it from an earlier process of this pid, where that is known.
        """
        newest = (
            select(workers.c.state)
            .where(workers.c.host == host, workers.c.pid == pid)
            .where(workers.c.process.is_(None) if process is None else workers.c.process == str(process))
            .order_by(workers.c.id.desc())
            .limit(1)
        )
        with self._database.read() as connection:
            state = connection.scalar(newest)
        return WorkerState(state) if state in GIVEN_UP else None

    def knows(self, process: Process, *, within_seconds: float) -> bool:
        """True where a worker of this process was heard of so lately."""
        seen = workers.c.heartbeat_at > self._database.now - within_seconds
        with self._database.read() as connection:
            return bool(connection.scalar(select(exists().where(workers.c.process == str(process), seen))))

    def namesakes(self) -> list[str]:
        """Workers of other stores with the id of this one that its live workers have met of late."""
        met = select(workers.c.namesake).where(workers.c.namesake.is_not(None), alive(self._database.now)).distinct()
        with self._database.read() as connection:
            return sorted(connection.scalars(met).all())

    def models(self) -> list[str]:
        """The models that a worker has held, by name."""
        held = select(workers.c.model).where(workers.c.device_name.is_not(None)).distinct()
        with self._database.read() as connection:
            return sorted(connection.scalars(held).all())

    def unserved_seconds(self, spec: ModelSpec, *, since: float) -> float:
        """Seconds in which no worker of this spec has lived: since the last one was seen, or since this time."""
        seen = func.coalesce(func.max(workers.c.heartbeat_at), since)
        with self._database.read() as connection:
            seconds = connection.scalar(
                select(self._database.now - self._database.larger(seen, since)).where(workers.c.spec == spec.canonical)
            )
        return max(0.0, seconds or 0.0)

    def ever_served(self, spec: ModelSpec) -> bool:
        """True once there has been a worker of this spec."""
        with self._database.read() as connection:
            return bool(connection.scalar(select(exists().where(workers.c.spec == spec.canonical))))

    def rows(
        self,
        *,
        only_alive: bool = True,
        spec: ModelSpec | None = None,
        job_id: str | None = None,
        seen_within_seconds: float | None = None,
    ) -> list[WorkerRow]:
        """Workers: all or the live ones, of one spec, that hold a batch of one job, or that were seen so lately."""
        now = self._database.now
        held = (
            select(func.count())
            .where(batches.c.worker_id == workers.c.id, batches.c.state == BatchState.LEASED.value)
            .scalar_subquery()
        )
        stopped = workers.c.state == WorkerState.STOPPED.value
        chosen = select(
            workers,
            held.label("leases"),
            alive(now).label("alive"),
            (now - workers.c.heartbeat_at).label("seen_seconds"),
            case((workers.c.state == WorkerState.LOADING.value, now - workers.c.loading_since)).label(
                "loading_seconds"
            ),
            case((alive(now), now), (stopped, workers.c.alive_until), else_=workers.c.heartbeat_at).label("up_until"),
        ).order_by(workers.c.id)
        if only_alive:
            chosen = chosen.where(alive(now))
        if spec is not None:
            chosen = chosen.where(workers.c.spec == spec.canonical)
        if seen_within_seconds is not None:
            chosen = chosen.where(workers.c.heartbeat_at > now - seen_within_seconds)
        if job_id is not None:
            holding = select(batches.c.worker_id).where(
                batches.c.job_id == job_id, batches.c.state == BatchState.LEASED.value
            )
            chosen = chosen.where(workers.c.id.in_(holding))
        with self._database.read() as connection:
            return [_worker(row) for row in connection.execute(chosen).all()]


def _worker(row: Row[Any]) -> WorkerRow:
    return WorkerRow(
        id=row.id,
        name=row.name,
        host=row.host,
        pid=row.pid,
        process=Process.parse(row.process),
        state=WorkerState(row.state),
        error=row.error,
        spec=ModelSpec.from_canonical(row.spec),
        only_job=row.only_job,
        identity=row.identity,
        device=row.device,
        device_name=row.device_name,
        device_uuid=row.device_uuid,
        torch_load_seconds=row.torch_load_seconds,
        loading_seconds=row.loading_seconds,
        model_load_seconds=row.model_load_seconds,
        weights_bytes=row.weights_bytes,
        engine=row.engine,
        engine_rows=row.engine_rows,
        context_tokens=row.context_tokens,
        cache_tokens=row.cache_tokens,
        alive=bool(row.alive),
        seen_seconds=row.seen_seconds,
        uptime_seconds=max(0.0, row.up_until - row.started_at),
        leases=row.leases,
        generation=row.generation,
        adapters=from_json(row.adapters),
        devices=devices_from_text(row.devices),
    )
