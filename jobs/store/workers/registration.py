"""Registration: the row that a worker writes about itself, from its start over each heartbeat to its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, case, func, insert, select, update

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.adapters import Adapter, from_json, to_json
from batchmill.jobs.models.device_memory import DeviceMemory, devices_text
from batchmill.jobs.models.engine_facts import EngineFacts
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.database.conflicts import retried
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.tables import batches, workers
from batchmill.jobs.store.workers.liveness import GIVEN_UP, MISSED_HEARTBEATS, alive

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


class Registration:
    """Writes the rows of workers; a row is one life of one worker's parent process."""

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

    @retried
    def meet(self, worker_id: int, namesake: str | None) -> None:
        """Records the namesake that this worker met, a worker of another store with this id; None for none."""
        with self._database.write() as connection:
            connection.execute(update(workers).where(workers.c.id == worker_id).values(namesake=namesake))
