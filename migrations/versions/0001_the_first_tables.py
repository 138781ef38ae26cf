"""the first tables"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=16), nullable=False),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("spec", sa.Text(), nullable=True, comment="canonical ModelSpec; known when the job leaves loading"),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("revision", sa.Text(), nullable=True),
        sa.Column("quantization", sa.Text(), nullable=True),
        sa.Column("batch_size", sa.Integer(), nullable=False),
        sa.Column("options", sa.Text(), nullable=False, comment="JSON: what the job's flags ask for"),
        sa.Column("sampling", sa.Text(), nullable=True, comment="JSON: what held, set by the first worker"),
        sa.Column(
            "fingerprint",
            sa.Text(),
            nullable=True,
            comment="SHA-256 of file, spec and options: equal jobs are equal here",
        ),
        sa.Column("file_name", sa.Text(), nullable=False),
        sa.Column("file_sha256", sa.Text(), nullable=True),
        sa.Column("command", sa.Text(), nullable=False),
        sa.Column("versions", sa.Text(), nullable=False, comment="JSON: of batchmill and of the worker's libraries"),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("queued_at", sa.Float(), nullable=True),
        sa.Column("started_at", sa.Float(), nullable=True),
        sa.Column("finished_at", sa.Float(), nullable=True),
        sa.Column("loading_until", sa.Float(), nullable=True, comment="the submit's lease while loading"),
        sa.Column(
            "retry_started_at",
            sa.Float(),
            nullable=True,
            comment="set while a retry moves requests to new batches",
        ),
        sa.CheckConstraint(
            "state = 'loading' OR (spec IS NOT NULL AND queued_at IS NOT NULL)", name=op.f("ck_jobs_queued")
        ),
        sa.CheckConstraint(
            "state IN ('loading', 'queued', 'running', 'completed', 'cancelling', 'cancelled')",
            name=op.f("ck_jobs_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.create_index("ix_jobs_fingerprint", ["fingerprint"], unique=False)
        batch_op.create_index("ix_jobs_spec_queued", ["spec", "queued_at", "id"], unique=False)
        batch_op.create_index("ix_jobs_state", ["state"], unique=False)

    op.create_table(
        "workers",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("error", sa.Text(), nullable=True, comment="why a failed worker could not load its model"),
        sa.Column("spec", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=True),
        sa.Column("quantization", sa.Text(), nullable=False),
        sa.Column(
            "only_job",
            sa.String(length=16),
            nullable=True,
            comment="the one job that it serves, if it serves one alone",
        ),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("device_name", sa.Text(), nullable=True),
        sa.Column("device_uuid", sa.Text(), nullable=True),
        sa.Column(
            "generation",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="counts its child processes",
        ),
        sa.Column("child_pid", sa.Integer(), nullable=True),
        sa.Column("model_load_seconds", sa.Float(), nullable=True),
        sa.Column("weights_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("versions", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("heartbeat_at", sa.Float(), nullable=False),
        sa.Column("alive_until", sa.Float(), nullable=False, comment="past it the worker counts as dead"),
        sa.CheckConstraint(
            "state IN ('starting', 'loading', 'ready', 'draining', 'stopped', 'failed')",
            name=op.f("ck_workers_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    with op.batch_alter_table("workers", schema=None) as batch_op:
        batch_op.create_index("ix_workers_spec_alive", ["spec", "alive_until"], unique=False)

    op.create_table(
        "batches",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("fence", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "worker_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            nullable=True,
            comment="who holds the lease",
        ),
        sa.Column("worker_generation", sa.Integer(), nullable=True),
        sa.Column("lease_until", sa.Float(), nullable=True),
        sa.Column("total", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("succeeded", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("failed", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("cancelled", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint("(state = 'leased') = (worker_id IS NOT NULL)", name=op.f("ck_batches_lease")),
        sa.CheckConstraint("state IN ('pending', 'leased', 'done', 'cancelled')", name=op.f("ck_batches_state")),
        sa.CheckConstraint("succeeded + failed + cancelled <= total", name=op.f("ck_batches_counts")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_batches_job_id")),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_batches_worker_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    with op.batch_alter_table("batches", schema=None) as batch_op:
        batch_op.create_index("ix_batches_job_state", ["job_id", "state", "id"], unique=False)
        batch_op.create_index(
            "ix_batches_worker",
            ["worker_id"],
            unique=False,
            sqlite_where=sa.text("worker_id IS NOT NULL"),
            postgresql_where=sa.text("worker_id IS NOT NULL"),
        )

    op.create_table(
        "requests",
        sa.Column("job_id", sa.String(length=16), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=False),
        sa.Column("batch_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("body", sa.Text(), nullable=False, comment="JSON: prompt or messages, sampling, passthrough"),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_requests_batch_id")),
        sa.PrimaryKeyConstraint("job_id", "index", name=op.f("pk_requests")),
        sa.UniqueConstraint("job_id", "custom_id", name=op.f("uq_requests_job_id_custom_id")),
    )
    with op.batch_alter_table("requests", schema=None) as batch_op:
        batch_op.create_index("ix_requests_batch", ["batch_id"], unique=False)

    op.create_table(
        "runs",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(length=16), nullable=False),
        sa.Column("batch_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("worker_generation", sa.Integer(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("device_uuid", sa.Text(), nullable=True),
        sa.Column("model_commit", sa.Text(), nullable=True, comment="what the spec's revision resolved to"),
        sa.Column("model_load_seconds", sa.Float(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("finished_at", sa.Float(), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=True),
        sa.Column("succeeded", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("failed", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("weights_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("peak_allocated_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("peak_reserved_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("device_total_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("in_flight", sa.Text(), nullable=False, comment="JSON: indexes that are in the engine now"),
        sa.Column("error_codes", sa.Text(), nullable=False, comment="JSON: {code: count} of its error outputs"),
        sa.CheckConstraint(
            "outcome IN ('done', 'released', 'cancelled', 'crashed', 'expired')", name=op.f("ck_runs_outcome")
        ),
        sa.CheckConstraint("(finished_at IS NULL) = (outcome IS NULL)", name=op.f("ck_runs_ended")),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_runs_batch_id")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_runs_job_id")),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_runs_worker_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("batch_id", "fence", name=op.f("uq_runs_batch_id_fence")),
    )
    with op.batch_alter_table("runs", schema=None) as batch_op:
        batch_op.create_index("ix_runs_job_started", ["job_id", "started_at"], unique=False)

    op.create_table(
        "outputs",
        sa.Column("job_id", sa.String(length=16), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column(
            "run_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            nullable=True,
            comment="who wrote it; none for what a cancel closed",
        ),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("choices", sa.Text(), nullable=False, comment="JSON: list of {text, finish_reason}"),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("completion_tokens", sa.Integer(), nullable=False),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("finished_at", sa.Float(), nullable=False),
        sa.CheckConstraint("(state = 'succeeded') = (error_code IS NULL)", name=op.f("ck_outputs_error")),
        sa.CheckConstraint("state IN ('succeeded', 'failed', 'cancelled')", name=op.f("ck_outputs_state")),
        sa.ForeignKeyConstraint(
            ["job_id", "index"], ["requests.job_id", "requests.index"], name=op.f("fk_outputs_job_id_index")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_outputs_run_id")),
        sa.PrimaryKeyConstraint("job_id", "index", name=op.f("pk_outputs")),
    )
    with op.batch_alter_table("outputs", schema=None) as batch_op:
        batch_op.create_index(
            "ix_outputs_unsuccessful",
            ["job_id", "index"],
            unique=False,
            sqlite_where=sa.text("state <> 'succeeded'"),
            postgresql_where=sa.text("state <> 'succeeded'"),
        )
