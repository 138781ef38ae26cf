"""an index of the runs that crashed, of which there are few, so that a crash reads no others"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Reads the runs once, and writes none of them."""
    crashed = sa.text("outcome = 'crashed'")
    op.create_index(
        "ix_runs_crashed", "runs", ["worker_id", "finished_at"], sqlite_where=crashed, postgresql_where=crashed
    )
