"""The tables of the store, their constraints and indexes. Times are seconds since 1970, UTC, by the database's clock.

Core tables rather than mapped classes: no row lives as an object, it is turned into a value of `jobs.requests`.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from batchmill.jobs.requests.states import BatchState, JobState, RunOutcome, WorkerState
from batchmill.jobs.store.columns import STATE_LENGTH, Id, count_column, one_of, partial_index

#: The alembic revision that these tables are; a test holds it equal to the newest migration.
REVISION = "0012"

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("name", Text),
    Column("state", String(STATE_LENGTH), nullable=False),
    Column("spec", Text, comment="canonical ModelSpec; known when the job leaves loading"),
    Column("model", Text),
    Column("revision", Text),
    Column("quantization", Text),
    Column("batch_size", Integer, nullable=False),
    Column("options", Text, nullable=False, comment="JSON: what the job's flags ask for"),
    Column("sampling", Text, comment="JSON: what held, set by the first worker"),
    Column("identity", Text, comment="what its model consists of, set by the first worker"),
    Column(
        "adapters",
        Text,
        comment="JSON: {name: {path, revision, identity}}, each set by the first worker that used it",
    ),
    Column("fingerprint", Text, comment="SHA-256 of file, spec and options: equal jobs are equal here"),
    Column("file_name", Text, nullable=False),
    Column("file_sha256", Text),
    Column("command", Text, nullable=False),
    Column("versions", Text, nullable=False, comment="JSON: of batchmill and of the worker's libraries"),
    Column("created_at", Float, nullable=False),
    Column("queued_at", Float),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("loading_until", Float, comment="the submit's lease while loading"),
    Column("retry_started_at", Float, comment="set while a retry moves requests to new batches"),
    Column("idempotency_key", Text, comment="set in the flip to queued; a second submit of it finds this job"),
    Column("kind", Text, nullable=False, server_default=text("'generation'"), comment="of all of its requests"),
    one_of("state", JobState),
    CheckConstraint("state = 'loading' OR (spec IS NOT NULL AND queued_at IS NOT NULL)", name="queued"),
    Index("ix_jobs_spec_queued", "spec", "queued_at", "id"),
    Index("ix_jobs_state", "state"),
    Index("ix_jobs_fingerprint", "fingerprint"),
    Index("ix_jobs_idempotency_key", "idempotency_key", unique=True),
)

batches = Table(
    "batches",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("job_id", String(16), ForeignKey("jobs.id"), nullable=False),
    Column("state", String(STATE_LENGTH), nullable=False),
    Column("fence", Integer, nullable=False, server_default=text("0")),
    Column("worker_id", Id, ForeignKey("workers.id"), comment="who holds the lease"),
    Column("worker_generation", Integer),
    Column("lease_until", Float),
    count_column("crashes"),
    Column("crashed_by", Id, comment="the worker whose process died last with these requests"),
    Column(
        "adapter",
        Text,
        nullable=False,
        server_default=text("''"),
        comment="the one that all of its requests name; empty where they name none",
    ),
    count_column("total"),
    count_column("succeeded"),
    count_column("failed"),
    count_column("cancelled"),
    count_column("prompt_tokens"),
    count_column("completion_tokens"),
    Column("stop_choices", BigInteger, comment="that ended by themselves; none where nobody has counted"),
    Column("length_choices", BigInteger, comment="that max_tokens ended; none where nobody has counted"),
    one_of("state", BatchState),
    CheckConstraint("succeeded + failed + cancelled <= total", name="counts"),
    CheckConstraint("(state = 'leased') = (worker_id IS NOT NULL)", name="lease"),
    Index("ix_batches_job_state", "job_id", "state", "id"),
    Index("ix_batches_job_adapter", "job_id", "state", "adapter", "id"),
    partial_index("ix_batches_suspects", "job_id", "id", where="crashes > 0"),
    partial_index("ix_batches_worker", "worker_id", where="worker_id IS NOT NULL"),
)

#: The value of `batches.adapter` where the requests name none.
NO_ADAPTER = ""
#: The columns of a batch that nobody holds, as an UPDATE sets them.
NO_LEASE = {"worker_id": None, "worker_generation": None, "lease_until": None}

requests = Table(
    "requests",
    metadata,
    Column("job_id", String(16), nullable=False),
    Column("index", Integer, nullable=False),
    Column("custom_id", Text, nullable=False),
    Column("batch_id", Id, ForeignKey("batches.id"), nullable=False),
    Column("body", Text, nullable=False, comment="JSON: prompt or messages, sampling, passthrough"),
    PrimaryKeyConstraint("job_id", "index"),
    UniqueConstraint("job_id", "custom_id"),
    Index("ix_requests_batch", "batch_id"),
)

outputs = Table(
    "outputs",
    metadata,
    Column("job_id", String(16), nullable=False),
    Column("index", Integer, nullable=False),
    Column("run_id", Id, ForeignKey("runs.id"), comment="who wrote it; none for what a cancel closed"),
    Column("state", String(STATE_LENGTH), nullable=False),
    Column("payload", Text, nullable=False, comment="JSON: list of what its job's kind is answered with"),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("finished_at", Float, nullable=False),
    Column(
        "queued_seconds",
        Float,
        comment="what the request waited in the engine; none where it answers a micro-batch at once",
    ),
    Column("prefill_seconds", Float, comment="what its prompt took"),
    Column("decode_seconds", Float, comment="what its answer took"),
    PrimaryKeyConstraint("job_id", "index"),
    ForeignKeyConstraint(["job_id", "index"], ["requests.job_id", "requests.index"]),
    CheckConstraint("state IN ('succeeded', 'failed', 'cancelled')", name="state"),
    CheckConstraint("(state = 'succeeded') = (error_code IS NULL)", name="error"),
    partial_index("ix_outputs_unsuccessful", "job_id", "index", where="state <> 'succeeded'"),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("job_id", String(16), ForeignKey("jobs.id"), nullable=False),
    Column("batch_id", Id, ForeignKey("batches.id"), nullable=False),
    Column("fence", Integer, nullable=False),
    Column("worker_id", Id, ForeignKey("workers.id"), nullable=False),
    Column("worker_generation", Integer, nullable=False),
    Column("device", Text, nullable=False),
    Column("device_uuid", Text),
    Column("model_commit", Text, comment="what the spec's revision resolved to"),
    Column("loading_since", Float, comment="when the worker's child that claimed it began to load"),
    Column("torch_load_seconds", Float, comment="what torch and its kin took that child to import"),
    Column("model_load_seconds", Float, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("outcome", String(STATE_LENGTH)),
    count_column("succeeded"),
    count_column("failed"),
    count_column("prompt_tokens"),
    count_column("completion_tokens"),
    count_column("weights_bytes"),
    count_column("peak_allocated_bytes"),
    count_column("peak_reserved_bytes"),
    count_column("device_total_bytes"),
    Column("in_flight", Text, nullable=False, comment="JSON: indexes that are in the engine now"),
    Column(
        "in_flight_tokens",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="what those have been answered with so far",
    ),
    Column("error_codes", Text, nullable=False, comment="JSON: {code: count} of its error outputs"),
    Column("devices", Text, comment="JSON: list of memory by device"),
    Column("energy_joules", Float, comment="of all its devices, by NVML"),
    one_of("outcome", RunOutcome),
    CheckConstraint("(finished_at IS NULL) = (outcome IS NULL)", name="ended"),
    UniqueConstraint("batch_id", "fence"),
    Index("ix_runs_job_started", "job_id", "started_at"),
    partial_index("ix_runs_crashed", "worker_id", "finished_at", where="outcome = 'crashed'"),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("host", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("process", Text, comment="its parent process as jobs.process writes it; none where the system tells none"),
    Column("namesake", Text, comment="JSON: a worker of another store that shows this one's id, seen of late"),
    Column("state", String(STATE_LENGTH), nullable=False),
    Column("error", Text, comment="why a failed worker could not load its model"),
    Column("spec", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("revision", Text),
    Column("quantization", Text, nullable=False),
    Column("only_job", String(16), comment="the one job that it serves, if it serves one alone"),
    Column("device", Text, nullable=False),
    Column("device_name", Text),
    Column("device_uuid", Text),
    Column("generation", Integer, nullable=False, server_default=text("0"), comment="counts its child processes"),
    Column("child_pid", Integer),
    Column("loading_since", Float, comment="when its newest child began to load"),
    Column(
        "torch_load_seconds",
        Float,
        comment="what torch and its kin took that child to import; none until they are there",
    ),
    Column("model_load_seconds", Float),
    count_column("weights_bytes"),
    Column("engine", Text, comment="what serves the model"),
    Column("engine_rows", BigInteger),
    Column("context_tokens", BigInteger),
    Column("cache_tokens", BigInteger),
    Column("devices", Text, comment="JSON: list of memory by device"),
    Column("identity", Text, comment="what the model consists of that its newest child holds; none while it loads"),
    Column("adapters", Text, comment="JSON: {name: {path, revision, identity}} that it holds"),
    Column(
        "kinds",
        Text,
        nullable=False,
        server_default=text("'[\"generation\"]'"),
        comment="JSON: list of the kinds of requests that its engine serves",
    ),
    Column("versions", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("heartbeat_at", Float, nullable=False),
    Column("alive_until", Float, nullable=False, comment="past it the worker counts as dead"),
    one_of("state", WorkerState),
    Index("ix_workers_spec_alive", "spec", "alive_until"),
)

stores = Table(
    "stores",
    metadata,
    Column("place", Integer, primary_key=True, autoincrement=False, comment="always 1: there is one row"),
    Column("id", String(32), nullable=False, comment="random; spools and queues are named by it"),
    CheckConstraint("place = 1", name="one"),
)

capacities = Table(
    "capacities",
    metadata,
    Column("spec", Text, nullable=False),
    Column("device", Text, nullable=False, comment="a GPU's UUID, or host and device"),
    Column("fits", BigInteger, nullable=False, comment="in the engine's unit, found when memory ran out"),
    Column("found_at", Float, nullable=False),
    PrimaryKeyConstraint("spec", "device"),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("spec", Text, nullable=False, comment="canonical ModelSpec"),
    Column("identity", Text, comment="what the model consisted of"),
    Column("baseline", Text, comment="canonical ModelSpec that it was compared with"),
    Column("data_name", Text, nullable=False),
    Column("data_sha256", Text, nullable=False),
    Column("device_name", Text, nullable=False),
    Column("measured", Text, nullable=False, comment="JSON: what was measured, and how"),
    Column("versions", Text, nullable=False, comment="JSON: of batchmill and of its libraries"),
    Column("created_at", Float, nullable=False),
    Index("ix_evaluations_spec_created", "spec", "created_at"),
)
