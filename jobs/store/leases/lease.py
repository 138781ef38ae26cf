"""Values that travel between a worker and the store: the session that asks, its leases, its reports and the results.

A lease is a worker's time-limited right to write a batch's outputs; the fence, raised by each claim, proves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, update

from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.request import FIRST_KIND, Output, Request
from batchmill.jobs.requests.states import RunOutcome
from batchmill.jobs.store.tables import runs


@dataclass(frozen=True, slots=True)
class WorkerSession:
    """One generation of one worker, as it asks: what it holds, and the defaults of its model."""

    worker_id: int
    generation: int
    spec: ModelSpec
    device: str
    lease_seconds: float
    #: The model's content (`jobs.models.identity`).
    identity: str
    model_load_seconds: float = 0.0
    model_commit: str | None = None
    device_uuid: str | None = None
    #: The model's defaults, as the kinds of its engine have them.
    defaults: Any = None
    versions: Mapping[str, str] = field(default_factory=dict)
    only_job: str | None = None
    adapters: tuple[Adapter, ...] = ()
    #: True where it takes jobs that nobody has begun.
    may_begin: bool = True
    #: The kinds of requests that its engine serves.
    kinds: frozenset[str] = frozenset({FIRST_KIND})


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write one batch's outputs, proven by its fence."""

    batch_id: int
    fence: int
    #: The attempt at the batch.
    run_id: int
    job_id: str
    #: True where its requests were in flight when a process died, so that nothing else may run beside them.
    apart: bool = False
    #: The kind of its requests.
    kind: str = FIRST_KIND


@dataclass(frozen=True, slots=True)
class Claimed:
    """A batch just claimed."""

    lease: Lease
    #: Those that have no output yet, in file order, as the job wants them run.
    requests: tuple[Request, ...]
    #: So many of them, from the first on, are recorded as in flight.
    in_flight: int
    #: The name that all of them name, if they do.
    adapter: str | None = None
    #: Bytes of their bodies.
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class BatchReport:
    """The report of a worker about one batch that it holds."""

    lease: Lease
    outputs: Sequence[Output] = ()
    #: The indexes that are in the engine, or enter it after this sync.
    in_flight: Sequence[int] = ()
    #: Tokens of the answers to those so far.
    in_flight_tokens: int = 0
    #: The devices since the batch was claimed.
    memory: Memory = field(default_factory=Memory)
    #: True where nothing of it has entered the engine, so that an idle worker may start it instead.
    untouched: bool = False
    #: True where it is handed back.
    release: bool = False
    #: True where it has further outputs, which the next sync reports, so that it is not to end in this one.
    more: bool = False


@dataclass(frozen=True, slots=True)
class SyncResult:
    """The result of a sync. Batches that are in none of the sets are still held."""

    lost: frozenset[int] = frozenset()
    finished: frozenset[int] = frozenset()
    cancelled: frozenset[int] = frozenset()
    released: frozenset[int] = frozenset()
    claimed: tuple[Claimed, ...] = ()
    drain: bool = False


def end_runs(
    connection: Connection, which: ColumnElement[bool], outcome: RunOutcome, *, now: ColumnElement[float]
) -> None:
    """Writes down how these runs ended. What was in flight when a process died stays on record."""
    ended: dict[str, object] = {"finished_at": now, "outcome": outcome.value, "in_flight_tokens": 0}
    if outcome not in (RunOutcome.CRASHED, RunOutcome.EXPIRED):
        ended["in_flight"] = "[]"
    connection.execute(update(runs).where(which, runs.c.finished_at.is_(None)).values(ended))
