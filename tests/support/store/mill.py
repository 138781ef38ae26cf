"""A small mill for tests of the store: loads jobs, opens worker sessions and answers requests, without processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import ColumnElement, Float, bindparam, func, select

from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.models.engine_facts import EngineFacts, EngineLimits
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import Choice, GenerationOptions, GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import FIRST_KIND, ErrorCode, Output, Provenance, RequestKey
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.leases.lease import BatchReport, Claimed, SyncResult, WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import metadata
from batchmill.jobs.store.workers.registration import Loaded

ECHO_SPEC = ModelSpec("echo", None, Quantization(Kind.NONE))
LEASE_SECONDS = 60.0
IDENTITY = "weights=1"


class Clock:
    """A clock that a test sets; the store reads it through one SQL expression."""

    def __init__(self, seconds: float = 1_000_000.0) -> None:
        self.seconds = seconds

    def expression(self) -> ColumnElement[float]:
        return bindparam("clock", callable_=lambda: self.seconds, type_=Float(), unique=True)


def load(
    store: Store,
    count: int = 10,
    *,
    batch_size: int = 4,
    spec: ModelSpec = ECHO_SPEC,
    options: GenerationOptions | None = None,
    name: str | None = None,
    fingerprint: str = "fingerprint",
) -> str:
    """A queued job of `count` requests: its id."""
    job_id = begin(store, batch_size=batch_size, options=options, name=name)
    store.creation.add(job_id, prompts=prompts(count), batch_size=batch_size, lease_seconds=LEASE_SECONDS)
    store.creation.open(job_id, spec=spec, file_sha256="0" * 64, fingerprint=fingerprint, lease_seconds=LEASE_SECONDS)
    return job_id


def begin(
    store: Store, *, batch_size: int = 4, options: GenerationOptions | None = None, name: str | None = None
) -> str:
    return store.creation.begin(
        name=name,
        options=options or GenerationOptions(),
        batch_size=batch_size,
        provenance=Provenance("prompts.jsonl", "", "batchmill submit prompts.jsonl", {"batchmill": "1"}),
        lease_seconds=LEASE_SECONDS,
    )


def prompts(count: int, *, first: int = 0) -> list[GenerationRequest]:
    return [
        GenerationRequest(index, f"request-{index}", prompt=f"prompt {index}") for index in range(first, first + count)
    ]


def named(*adapters: str | None, first: int = 0) -> list[GenerationRequest]:
    """A request for each of these adapters, None for the model alone."""
    return [
        replace(each, adapter=name) for each, name in zip(prompts(len(adapters), first=first), adapters, strict=True)
    ]


def load_named(store: Store, *adapters: str | None, batch_size: int = 4, spec: ModelSpec = ECHO_SPEC) -> str:
    """A queued job of one request for each of these adapters: its id."""
    declared = tuple(sorted({each for each in adapters if each is not None}))
    job_id = begin(store, batch_size=batch_size, options=GenerationOptions(adapters=declared))
    store.creation.add(job_id, prompts=named(*adapters), batch_size=batch_size, lease_seconds=LEASE_SECONDS)
    store.creation.open(job_id, spec=spec, file_sha256="0" * 64, fingerprint="f", lease_seconds=LEASE_SECONDS)
    return job_id


def session(
    store: Store,
    *,
    name: str = "w",
    ready: bool = True,
    only_job: str | None = None,
    spec: ModelSpec = ECHO_SPEC,
    adapters: Sequence[Adapter] = (),
    identity: str = IDENTITY,
    host: str = "host",
    process: Process | None = None,
    kinds: frozenset[str] = frozenset({FIRST_KIND}),
) -> WorkerSession:
    """A live worker, ready unless told otherwise."""
    worker_id = store.registration.register(
        host=host,
        name=name,
        pid=1,
        spec=spec,
        device="cpu",
        only_job=only_job,
        beat=5.0,
        adapters=adapters,
        process=process,
    )
    generation = store.registration.new_generation(worker_id, child_pid=2)
    if ready:
        limits = EngineLimits("echo", 8, 128, 1_024)
        facts = EngineFacts(limits, identity, None, tuple(adapters), 0.5, weights_by_device=(100,), kinds=kinds)
        loaded = Loaded(facts, "cpu", None, {"torch": "2"})
        store.registration.loaded(worker_id, generation, loaded=loaded)
    return WorkerSession(
        worker_id,
        generation,
        spec,
        "cpu",
        LEASE_SECONDS,
        identity,
        model_load_seconds=0.5,
        defaults=SamplingParams(top_k=7),
        versions={"torch": "2"},
        only_job=only_job,
        adapters=tuple(adapters),
        kinds=kinds,
    )


def claim(store: Store, who: WorkerSession, *, wanted: int = 1, room: int = 100) -> tuple[Claimed, ...]:
    return store.leases.sync(who, [], wanted_requests=wanted, in_flight_room=room).claimed


def answered(claimed: Claimed, *, count: int | None = None, error: ErrorCode | None = None) -> BatchReport:
    """A batch of which the first `count` requests (all, if None) are answered."""
    mine = claimed.requests[:count]
    return BatchReport(
        claimed.lease,
        outputs=[output(claimed.lease.job_id, each.index, error=error) for each in mine],
        in_flight=[each.index for each in claimed.requests[len(mine) :]],
        memory=Memory(100, 200 + claimed.lease.batch_id, 300, 1_000),
    )


def output(job_id: str, index: int, *, error: ErrorCode | None = None, text: str | None = None) -> Output:
    key = RequestKey(job_id, index)
    if error is not None:
        return Output.failed(key, error, "it failed", prompt_tokens=2)
    return Output(key, (Choice(text or f"answer {index}", "stop"),), prompt_tokens=2, completion_tokens=3)


def work_off(store: Store, who: WorkerSession, *, error: ErrorCode | None = None) -> int:
    """Answers everything that can be claimed: how many requests."""
    done = 0
    while claimed := claim(store, who):
        store.leases.sync(who, [answered(each, error=error) for each in claimed])
        done += sum(len(each.requests) for each in claimed)
    return done


def save(store: Store, who: WorkerSession, held: Sequence[BatchReport]) -> SyncResult:
    return store.leases.sync(who, held)


def rows(store: Store, table: str) -> int:
    """Counts the rows of a table."""
    with store.database.read() as connection:
        return connection.scalar(select(func.count()).select_from(metadata.tables[table])) or 0
