"""what each device of a run and a worker held, adapters of workers and batches, and evaluations"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("devices", sa.Text(), nullable=True, comment="JSON: list of memory by device"))
    op.add_column("runs", sa.Column("energy_joules", sa.Float(), nullable=True, comment="of all its devices, by NVML"))
    op.add_column("workers", sa.Column("devices", sa.Text(), nullable=True, comment="JSON: list of memory by device"))
    op.add_column(
        "workers",
        sa.Column("adapters", sa.Text(), nullable=True, comment="JSON: {name: {path, revision}} that it holds"),
    )
    op.add_column(
        "batches",
        sa.Column(
            "adapter",
            sa.Text(),
            server_default=sa.text("''"),
            nullable=False,
            comment="the one that all of its requests name; empty where they name none",
        ),
    )
    op.create_index("ix_batches_job_adapter", "batches", ["job_id", "state", "adapter", "id"])
    op.add_column(
        "jobs",
        sa.Column(
            "adapters",
            sa.Text(),
            nullable=True,
            comment="JSON: {name: {path, revision}}, each set by the first worker that used it",
        ),
    )
    op.create_table(
        "evaluations",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("spec", sa.Text(), nullable=False, comment="canonical ModelSpec"),
        sa.Column("baseline", sa.Text(), nullable=True, comment="canonical ModelSpec that it was compared with"),
        sa.Column("data_name", sa.Text(), nullable=False),
        sa.Column("data_sha256", sa.Text(), nullable=False),
        sa.Column("device_name", sa.Text(), nullable=False),
        sa.Column("measured", sa.Text(), nullable=False, comment="JSON: what was measured, and how"),
        sa.Column("versions", sa.Text(), nullable=False, comment="JSON: of batchmill and of its libraries"),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
    )
    op.create_index("ix_evaluations_spec_created", "evaluations", ["spec", "created_at"])
