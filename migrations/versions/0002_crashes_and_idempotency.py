"""crash counts of batches, idempotency keys of jobs, sick workers, and what devices hold"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "idempotency_key",
            sa.Text(),
            nullable=True,
            comment="set in the flip to queued; a second submit of it finds this job",
        ),
    )
    op.create_index("ix_jobs_idempotency_key", "jobs", ["idempotency_key"], unique=True)
    op.add_column("batches", sa.Column("crashes", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column(
        "batches",
        sa.Column(
            "crashed_by",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            nullable=True,
            comment="the worker whose process died last with these requests",
        ),
    )
    op.create_index(
        "ix_batches_suspects",
        "batches",
        ["job_id", "id"],
        sqlite_where=sa.text("crashes > 0"),
        postgresql_where=sa.text("crashes > 0"),
    )
    with op.batch_alter_table("workers") as batch_op:
        if op.get_bind().dialect.name != "sqlite":  # where it makes the table anew, and leaves such a constraint out
            batch_op.drop_constraint(op.f("ck_workers_state"), type_="check")
        batch_op.create_check_constraint(
            op.f("ck_workers_state"),
            "state IN ('starting', 'loading', 'ready', 'draining', 'stopped', 'failed', 'sick')",
        )
    op.create_table(
        "capacities",
        sa.Column("spec", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False, comment="a GPU's UUID, or host and device"),
        sa.Column("fits", sa.BigInteger(), nullable=False, comment="in the engine's unit, found when memory ran out"),
        sa.Column("found_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("spec", "device", name=op.f("pk_capacities")),
    )
