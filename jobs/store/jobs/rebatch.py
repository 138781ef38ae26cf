"""Moves requests into new batches of their job, as a retry and a crash do. It decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from sqlalchemy import Connection, insert, update

from batchmill.jobs.requests.states import BatchState
from batchmill.jobs.store.bounds import cut
from batchmill.jobs.store.tables import batches, requests


def new_batches(
    connection: Connection,
    job_id: str,
    sizes: Sequence[int],
    *,
    adapter: str,
    crashes: int = 0,
    crashed_by: int | None = None,
) -> list[int]:
    """Inserts pending batches of these sizes, of requests that name this adapter (or none); returns their ids."""
    if not sizes:
        return []
    rows = [
        {
            "job_id": job_id,
            "state": BatchState.PENDING.value,
            "total": size,
            "adapter": adapter,
            "crashes": crashes,
            "crashed_by": crashed_by,
        }
        for size in sizes
    ]
    returning = insert(batches).returning(batches.c.id, sort_by_parameter_order=True)
    return list(connection.scalars(returning, rows).all())


def move(
    connection: Connection,
    job_id: str,
    sizes: Mapping[int, int],
    *,
    batch_size: int,
    adapter: str,
    crashes: int = 0,
    crashed_by: int | None = None,
) -> None:
    """Puts these requests into new pending batches of at most `batch_size`; the caller keeps the old ones' counts.

    `sizes`: {index: bytes of its body}, in order. All of them name this adapter (or none).
    """
    counts = cut(sizes.values(), most=batch_size)
    new = new_batches(connection, job_id, counts, adapter=adapter, crashes=crashes, crashed_by=crashed_by)
    indexes = iter(sizes)
    for batch_id, count in zip(new, counts, strict=True):
        each = list(islice(indexes, count))
        connection.execute(
            update(requests).where(requests.c.job_id == job_id, requests.c.index.in_(each)).values(batch_id=batch_id)
        )
