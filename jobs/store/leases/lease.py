"""What travels between a worker and the store: who asks, what it holds, what it gets back.

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
    """Who asks: one generation of one worker, what it holds and what it does where nobody says otherwise.

    `identity`: what its model consists of (`jobs.models.identity`).
    `may_begin`: whether it takes jobs that nobody has begun. `kinds`: of requests that its engine serves; `defaults`:
    what its model asks for, as those kinds have it.
    """

    worker_id: int
    generation: int
    spec: ModelSpec
    device: str
    lease_seconds: float
    identity: str
    model_load_seconds: float = 0.0
    model_commit: str | None = None
    device_uuid: str | None = None
    defaults: Any = None
    versions: Mapping[str, str] = field(default_factory=dict)
    only_job: str | None = None
    adapters: tuple[Adapter, ...] = ()
    may_begin: bool = True
    kinds: frozenset[str] = frozenset({FIRST_KIND})


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write one batch's outputs, proven by its fence; `run_id` is the attempt.

    `apart`: its requests were in flight when a process died, so nothing else may run beside them. `kind`: of its
    requests.
    """

    batch_id: int
    fence: int
    run_id: int
    job_id: str
    apart: bool = False
    kind: str = FIRST_KIND


@dataclass(frozen=True, slots=True)
class Claimed:
    """A batch just claimed: its requests that have no output yet, in file order, as the job wants them run.

    The first `in_flight` of them are recorded as in flight. `adapter`: the name that all of them name, if they do.
    `size_bytes`: of their bodies.
    """

    lease: Lease
    requests: tuple[Request, ...]
    in_flight: int
    adapter: str | None = None
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What a worker says of one batch it holds.

    `in_flight`: the indexes that are in the engine, or enter it after this turn; `in_flight_tokens`: what those have
    been answered with so far. `release`: hand it back. `memory`: since the batch was claimed. `more`: it has further
    outputs, which the next turn says, so it is not to end in this.
    """

    lease: Lease
    outputs: Sequence[Output] = ()
    in_flight: Sequence[int] = ()
    in_flight_tokens: int = 0
    memory: Memory = field(default_factory=Memory)
    untouched: bool = False
    release: bool = False
    more: bool = False


@dataclass(frozen=True, slots=True)
class SyncResult:
    """What a turn brought back. Batches that are in none of the sets are held on."""

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
