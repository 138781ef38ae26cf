"""Pending batches in the order in which they are claimed, for workers that hold certain adapters.

A batch needs one adapter or none, so that it is found by that and its job's turn. It claims nothing, and does not know
who asks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, Select, func, literal, literal_column, or_, select, union_all

from batchmill.jobs.models.adapters import Adapter, from_json
from batchmill.jobs.requests.states import CLAIMABLE_JOB_STATES, BatchState
from batchmill.jobs.store.tables import NO_ADAPTER, batches, jobs

#: Written as the partial index has it.
_SUSPECT = batches.c.crashes > literal_column("0")
_JOINED = jobs.join(batches, batches.c.job_id == jobs.c.id)


class Need(NamedTuple):
    """The need of a batch for an adapter."""

    #: The adapter's name, or NO_ADAPTER.
    adapter: str = NO_ADAPTER
    #: Jobs that mean another adapter by that name.
    not_of: tuple[str, ...] = ()


class Among(NamedTuple):
    """The open jobs that are looked through; all others are passed over."""

    #: The canonical ModelSpec.
    spec: str
    #: The kinds of their requests.
    kinds: frozenset[str]
    #: The models that a begun job may be of; None for any.
    identities: frozenset[str] | None = None
    #: The one job; None for all.
    only_job: str | None = None
    #: True where jobs that nobody has begun are passed over, too.
    begun: bool = False


class Head(NamedTuple):
    """The first pending batch of one job that needs this adapter (or none); it sorts by its job's turn."""

    queued_at: float
    job_id: str
    batch_id: int
    adapter: str


def needs_met(connection: Connection, spec: str, adapters: Iterable[Adapter]) -> tuple[Need, ...]:
    """The needs of batches of this canonical spec that a worker with these adapters meets."""
    held: defaultdict[str, set[Adapter]] = defaultdict(set)
    for each in adapters:
        held[each.name].add(each)
    if not held:
        return (Need(),)
    settled = connection.execute(
        select(jobs.c.id, jobs.c.adapters).where(
            jobs.c.spec == spec, jobs.c.state.in_(CLAIMABLE_JOB_STATES), jobs.c.adapters.is_not(None)
        )
    ).all()
    others: defaultdict[str, list[str]] = defaultdict(list)
    for row in settled:
        for meant in from_json(row.adapters):
            if not any(map(meant.agrees_with, held.get(meant.name, {meant}))):
                others[meant.name].append(row.id)
    return (Need(), *(Need(name, tuple(others[name])) for name in sorted(held)))


def heads(
    connection: Connection, among: Among, needs: Iterable[Need], *, most: int, suspects: bool = False
) -> list[Head]:
    """The first pending batch of each job for each of these needs, of at most `most` jobs, the oldest job's first.

    Each is one step into an index, however many batches wait behind it or for an adapter that nobody asks for here.
    """
    chosen: list[Select[Any]] = []
    for need in needs:
        waits = (batches.c.job_id == jobs.c.id, *waiting(need.adapter, suspects=suspects))
        first = select(func.min(batches.c.id)).where(*waits).correlate(jobs).scalar_subquery()
        of_jobs = select(
            jobs.c.queued_at, jobs.c.id.label("job_id"), first.label("batch_id"), literal(need.adapter).label("adapter")
        )
        each = _of_queue(of_jobs, among, need).subquery()
        waited_for = select(each).where(each.c.batch_id.is_not(None))
        chosen.append(waited_for.order_by(each.c.queued_at, each.c.job_id).limit(most))
    return sorted(Head(row.queued_at, row.job_id, row.batch_id, row.adapter) for row in _rows(connection, chosen))


def count_pending(connection: Connection, among: Among, needs: Iterable[Need], *, most: int) -> Counter[str]:
    """The number of pending batches by the adapter that they need, each counted up to `most`."""
    chosen: list[Select[Any]] = []
    for need in needs:
        pending = select(batches.c.id).select_from(_JOINED).where(*waiting(need.adapter))
        page = _of_queue(pending, among, need).limit(most).subquery()
        counted: Any = select(literal(need.adapter).label("adapter"), func.count().label("batches"))
        chosen.append(counted.select_from(page))
    return Counter({row.adapter: row.batches for row in _rows(connection, chosen)})


def pending_batches(connection: Connection, among: Among, needs: Iterable[Need], *, most: int) -> list[int]:
    """Ids of pending batches that need one of these, the oldest job's first."""
    chosen: list[Select[Any]] = []
    for need in needs:
        pending = select(jobs.c.queued_at, jobs.c.id, batches.c.id).select_from(_JOINED).where(*waiting(need.adapter))
        chosen.append(_of_queue(pending, among, need).order_by(jobs.c.queued_at, jobs.c.id, batches.c.id).limit(most))
    return [batch_id for _, _, batch_id in sorted(tuple(row) for row in _rows(connection, chosen))[:most]]


def waiting(adapter: str, *, suspects: bool = False) -> tuple[ColumnElement[bool], ...]:
    """Conditions for batches that are pending and need this adapter (or none); of those a crash made, if `suspects`."""
    if not suspects:
        return (batches.c.state == BatchState.PENDING.value, batches.c.adapter == adapter)
    # Suspects are few and have an index of their own; said like this, no other seems better to a database.
    state, needed = func.coalesce(batches.c.state, ""), func.coalesce(batches.c.adapter, "")
    return (_SUSPECT, state == BatchState.PENDING.value, needed == adapter)


def _of_queue(chosen: Select[Any], among: Among, need: Need) -> Select[Any]:
    chosen = chosen.where(jobs.c.spec == among.spec, jobs.c.state.in_(CLAIMABLE_JOB_STATES))
    chosen = chosen.where(jobs.c.kind.in_(sorted(among.kinds)))
    if among.identities is not None:
        settled = jobs.c.identity.in_(among.identities)
        chosen = chosen.where(settled if among.begun else or_(jobs.c.identity.is_(None), settled))
    if need.not_of:
        chosen = chosen.where(jobs.c.id.not_in(need.not_of))
    return chosen if among.only_job is None else chosen.where(jobs.c.id == among.only_job)


def _rows(connection: Connection, chosen: Sequence[Select[Any]]) -> Sequence[Row[Any]]:
    """The rows of all these queries."""
    if not chosen:
        return []
    if len(chosen) == 1:
        return connection.execute(chosen[0]).all()
    return connection.execute(union_all(*(select(each.subquery()) for each in chosen))).all()
