"""which process a worker is, and which store this one is"""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_OF_WORKERS = {
    "process": "its parent process as jobs.process writes it; none where the system tells none",
    "namesake": "JSON: a worker of another store that shows this one's id, seen of late",
}


def upgrade() -> None:
    for name, comment in _OF_WORKERS.items():
        op.add_column("workers", sa.Column(name, sa.Text(), nullable=True, comment=comment))
    stores = op.create_table(
        "stores",
        sa.Column("place", sa.Integer(), autoincrement=False, nullable=False, comment="always 1: there is one row"),
        sa.Column("id", sa.String(length=32), nullable=False, comment="random; spools and queues are named by it"),
        sa.CheckConstraint("place = 1", name=op.f("ck_stores_one")),
        sa.PrimaryKeyConstraint("place", name=op.f("pk_stores")),
    )
    op.bulk_insert(stores, [{"place": 1, "id": uuid.uuid4().hex}])
