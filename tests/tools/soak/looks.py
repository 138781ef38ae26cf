"""Queries of the faults, in plain SQL: which worker holds which work, and whether another has taken it over."""

from __future__ import annotations

import json
from dataclasses import dataclass

from sqlalchemy import text

from batchmill.jobs.errors import StoreError
from tests.tools.soak.posts import Row
from tests.tools.soak.world import World

#: So many of the requests of each lease stand for all.
_SOME = 10


@dataclass(frozen=True, slots=True)
class Held:
    """The work of a child when it was killed: for each batch its job and some of its unanswered requests."""

    worker_id: int
    generation: int
    requests: tuple[tuple[str, tuple[int, ...]], ...]


def held_by(world: World, row: Row) -> Held:
    """Raises StoreError."""
    query = text("""SELECT u.job_id, u.in_flight FROM runs u JOIN batches b ON b.id = u.batch_id
                    WHERE b.worker_id = :id AND b.state = 'leased' AND u.finished_at IS NULL""")
    with world.glance.database.read() as connection:
        found = connection.execute(query, {"id": row.worker_id}).all()
    requests = ((each.job_id, tuple(json.loads(each.in_flight)[:_SOME])) for each in found)
    return Held(row.worker_id, row.generation, tuple(each for each in requests if each[1]))


def runs_again(world: World, held: Held) -> bool:
    """True where some request that was in flight is answered, or held by another process."""
    query = """SELECT count(*) FROM requests r JOIN batches b ON b.id = r.batch_id
               LEFT JOIN outputs o ON o.job_id = r.job_id AND o."index" = r."index"
               WHERE r.job_id = :job AND r."index" IN ({})
               AND (o.job_id IS NOT NULL OR (b.state = 'leased'
                    AND NOT (b.worker_id = :worker AND b.worker_generation <= :generation)))"""
    with world.glance.database.read() as connection:
        for job_id, indexes in held.requests:
            chosen = text(query.format(", ".join(map(str, indexes))))
            values = {"job": job_id, "worker": held.worker_id, "generation": held.generation}
            if connection.scalar(chosen, values):
                return True
    return not held.requests


def is_ready(world: World, row: Row) -> bool:
    """True where a later child of this worker holds its model, or did."""
    query = text("""SELECT 1 FROM workers WHERE id = :id AND generation > :generation
                    AND (state = 'ready' OR generation > :generation + 1)""")
    with world.glance.database.read() as connection:
        values = {"id": row.worker_id, "generation": row.generation}
        return connection.scalar(query, values) is not None


def has_no_leases(world: World, worker_id: int) -> bool:
    query = text("SELECT count(*) FROM batches WHERE worker_id = :id AND state = 'leased'")
    with world.glance.database.read() as connection:
        return not connection.scalar(query, {"id": worker_id})


def newest_run(world: World) -> int:
    with world.glance.database.read() as connection:
        return int(connection.scalar(text("SELECT coalesce(max(id), 0) FROM runs")) or 0)


def outputs_count(world: World) -> int:
    """Counts the outputs that all runs have saved. Raises StoreError."""
    with world.glance.database.read() as connection:
        return int(connection.scalar(text("SELECT coalesce(sum(succeeded + failed), 0) FROM runs")) or 0)


def is_saving(world: World, since_count: int) -> bool:
    """True where outputs were saved since then, or nobody holds any work."""
    if outputs_count(world) > since_count:
        return True
    with world.glance.database.read() as connection:
        return connection.scalar(text("SELECT 1 FROM batches WHERE state = 'leased' LIMIT 1")) is None


def some_batch(world: World) -> int:
    """A batch of late, whatever its state."""
    with world.glance.database.read() as connection:
        return int(connection.scalar(text("SELECT coalesce(max(id), 1) FROM batches")) or 1)


def is_moving(world: World, since_run: int) -> bool:
    """True where a batch was claimed since then, or none is pending."""
    if newest_run(world) > since_run:
        return True
    pending = text("""SELECT 1 FROM batches b JOIN jobs j ON j.id = b.job_id
                      WHERE b.state = 'pending' AND j.state IN ('queued', 'running') LIMIT 1""")
    with world.glance.database.read() as connection:
        return connection.scalar(pending) is None


def or_none(ask: object, *arguments: object) -> object:
    """Returns the result of `ask`, or None while the store is away."""
    try:
        return ask(*arguments)  # type: ignore[operator]
    except StoreError:
        return None
