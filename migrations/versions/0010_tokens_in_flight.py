"""how far the answers are that a run has in flight"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds a column with a default: no row is rewritten."""
    comment = "what those have been answered with so far"
    column = sa.Column(
        "in_flight_tokens", sa.BigInteger(), nullable=False, server_default=sa.text("0"), comment=comment
    )
    op.add_column("runs", column)
