"""The rows of workers: what each is, what it holds, since when, and whether it is alive."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, case, exists, func, insert, or_, select, update

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.adapters import Adapter, from_json, to_json
from batchmill.jobs.models.device_memory import DeviceMemory, devices_from_text, devices_text
from batchmill.jobs.models.engine_facts import EngineFacts
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import BatchState, WorkerState
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.conflicts import retried
from batchmill.jobs.store.database import Database
from batchmill.jobs.store.tables import batches, workers

#: A worker counts as dead after this many heartbeats that did not come.
MISSED_HEARTBEATS = 4
#: A clock that is set back by less makes nobody dead.
_CLOCK_SLACK_SECONDS = 1.0
#: The states in which a worker takes no work any more, and for which its row keeps the reason.
GIVEN_UP = frozenset({WorkerState.FAILED, WorkerState.SICK})


#: The columns of a worker whose child holds no model (yet).
_NOTHING_HELD: dict[str, object] = {
    "identity": None,
    "torch_load_seconds": None,
    "model_load_seconds": None,
    "weights_bytes": 0,
    "engine": None,
    "engine_rows": None,
    "context_tokens": None,
    "cache_tokens": None,
    "devices": None,
}


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The values that the parent reads back with each heartbeat: its child, and the state that the child wrote."""

    state: WorkerState
    generation: int
    child_pid: int | None
    error: str | None
    leases: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A child's account of itself once its engine is open."""

    facts: EngineFacts
    device_name: str
    device_uuid: str | None
    versions: Mapping[str, str]
    #: The most that each device held so far.
    devices: tuple[DeviceMemory, ...] = ()


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


class Workers:
    """The rows of the workers; a row is one life of one worker's parent process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @retried
    def register(
        self,
        *,
        host: str,
        name: str,
        pid: int,
        spec: ModelSpec,
        device: str,
        only_job: str | None,
        beat: float,
        adapters: Sequence[Adapter] = (),
        process: Process | None = None,
    ) -> int:
        """Adds a worker in the state `starting` and returns its id.

        `beat`: the interval of its heartbeats in seconds.
        `process`: its parent process, by which others know whether it lives; None where that is unknown.

        Raises UsageError where a live worker of this spec holds another adapter by the name of one of `adapters`.
        """
        now = self._database.now
        with self._database.write() as connection:
            if adapters:
                # Two workers that register at once would each see the other's row too late.
                self._database.alone(connection, f"adapters of {spec.canonical}")
                self._refuse_other_meanings(connection, spec, adapters)
            row = insert(workers).values(
                host=host,
                name=name,
                pid=pid,
                process=None if process is None else str(process),
                state=WorkerState.STARTING.value,
                spec=spec.canonical,
                model=spec.model,
                revision=spec.revision,
                quantization=spec.quantization.canonical,
                only_job=only_job,
                device=device,
                adapters=to_json(adapters) if adapters else None,
                versions="{}",
                started_at=now,
                heartbeat_at=now,
                alive_until=now + MISSED_HEARTBEATS * beat,
            )
            return int(connection.execute(row.returning(workers.c.id)).scalar_one())

    def _refuse_other_meanings(self, connection: Connection, spec: ModelSpec, adapters: Sequence[Adapter]) -> None:
        wanted = {each.name: each for each in adapters}
        rows = connection.execute(
            select(
                workers.c.name,
                workers.c.host,
                workers.c.adapters,
                (self._database.now - workers.c.heartbeat_at).label("seen_seconds"),
            )
            .where(workers.c.spec == spec.canonical, workers.c.adapters.is_not(None), alive(self._database.now))
            .order_by(workers.c.id)
        ).all()
        for row in rows:
            for held in from_json(row.adapters):
                mine = wanted.get(held.name, held)
                if not mine.agrees_with(held):
                    raise UsageError(
                        f"the adapter {held.name!r} is {held.where} at worker {row.name} on {row.host} (last seen"
                        f" {row.seen_seconds:.0f} s ago), and {mine.where} was asked for here: stop that worker, or"
                        " choose another name"
                    )

    @retried
    def heartbeat(self, worker_id: int, *, beat: float, hindrance: str | None = None) -> Heartbeat:
        """Records that the worker lives, and what hinders it."""
        now = self._database.now
        with self._database.write() as connection:
            row = connection.execute(
                update(workers)
                .where(workers.c.id == worker_id)
                .values(
                    heartbeat_at=now,
                    alive_until=now + MISSED_HEARTBEATS * beat,
                    error=case((workers.c.state.in_(GIVEN_UP), workers.c.error), else_=hindrance),
                )
                .returning(workers.c.state, workers.c.generation, workers.c.child_pid, workers.c.error)
            ).one()
            held = connection.scalar(select(func.count()).select_from(batches).where(batches.c.worker_id == worker_id))
        return Heartbeat(WorkerState(row.state), row.generation, row.child_pid, row.error, held or 0)

    @retried
    def child_died(self, worker_id: int, generation: int) -> None:
        """Records that the child of this generation is gone with all that it held; the next one is being started."""
        with self._database.write() as connection:
            connection.execute(
                update(workers)
                .where(workers.c.id == worker_id, workers.c.generation == generation)
                .where(workers.c.state.in_([WorkerState.LOADING.value, WorkerState.READY.value]))
                .values(_NOTHING_HELD | {"state": WorkerState.STARTING.value, "child_pid": None})
            )

    @retried
    def new_generation(self, worker_id: int, *, child_pid: int) -> int:
        """Records that a new child of this worker begins to load its model, and returns its generation."""
        with self._database.write() as connection:
            return int(
                connection.execute(
                    update(workers)
                    .where(workers.c.id == worker_id)
                    .values(
                        generation=workers.c.generation + 1,
                        child_pid=child_pid,
                        loading_since=self._database.now,
                        **_NOTHING_HELD,
                        # A pool replaces the child that has given up; its worker has given up all the same.
                        state=case((workers.c.state.in_(GIVEN_UP), workers.c.state), else_=WorkerState.LOADING.value),
                    )
                    .returning(workers.c.generation)
                ).scalar_one()
            )

    @retried
    def imported(self, worker_id: int, generation: int, *, seconds: float) -> None:
        """Records that the child has imported torch and its kin, and goes on to its model."""
        with self._database.write() as connection:
            connection.execute(
                update(workers)
                .where(workers.c.id == worker_id, workers.c.generation == generation)
                .values(torch_load_seconds=seconds)
            )

    @retried
    def loaded(self, worker_id: int, generation: int, *, loaded: Loaded) -> None:
        """Records that the child holds its model and may be given work."""
        facts, limits = loaded.facts, loaded.facts.limits
        adapters = {"adapters": to_json(facts.adapters)} if facts.adapters else {}
        with self._database.write() as connection:
            connection.execute(
                update(workers)
                .where(workers.c.id == worker_id, workers.c.generation == generation)
                .where(workers.c.state == WorkerState.LOADING.value)
                .values(
                    state=WorkerState.READY.value,
                    device_name=loaded.device_name,
                    device_uuid=loaded.device_uuid,
                    model_load_seconds=facts.load_seconds,
                    weights_bytes=facts.weights_bytes,
                    versions=json.dumps(dict(loaded.versions)),
                    engine=limits.kind,
                    engine_rows=limits.rows,
                    context_tokens=limits.context_tokens,
                    cache_tokens=limits.cache_tokens,
                    devices=devices_text(loaded.devices),
                    identity=facts.identity,
                    kinds=json.dumps(sorted(facts.kinds)),
                    **adapters,
                )
            )

    @retried
    def measured(self, worker_id: int, generation: int, *, devices: Sequence[DeviceMemory]) -> None:
        """Records the memory of each device of this child; that of an older child is ignored."""
        with self._database.write() as connection:
            connection.execute(
                update(workers)
                .where(workers.c.id == worker_id, workers.c.generation == generation)
                .values(devices=devices_text(devices))
            )

    @retried
    def enter(self, worker_id: int, state: WorkerState, *, error: str | None = None) -> None:
        """Records that the worker drains, has stopped, or gave up for this reason; one that gave up stays so."""
        values: dict[str, object] = {"state": state.value}
        if error is not None:
            values["error"] = error
        if state is WorkerState.STOPPED:
            values |= {"alive_until": self._database.now, "child_pid": None}
        with self._database.write() as connection:
            connection.execute(
                update(workers).where(workers.c.id == worker_id, workers.c.state.not_in(GIVEN_UP)).values(values)
            )

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

    @retried
    def meet(self, worker_id: int, namesake: str | None) -> None:
        """Records the namesake that this worker met, a worker of another store with this id; None for none."""
        with self._database.write() as connection:
            connection.execute(update(workers).where(workers.c.id == worker_id).values(namesake=namesake))

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
            found = connection.scalar(
                select(self._database.now - self._database.larger(seen, since)).where(workers.c.spec == spec.canonical)
            )
        return max(0.0, found or 0.0)

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


def alive(now: ColumnElement[float]) -> ColumnElement[bool]:
    """True for a row of a live worker that has not given up.

    One last seen in the future counts as dead until its next heartbeat: the store's clock was set back since.
    """
    seen = workers.c.heartbeat_at <= now + _CLOCK_SLACK_SECONDS
    return and_(workers.c.alive_until > now, seen, workers.c.state.not_in(GIVEN_UP))


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
