"""how many choices of a batch ended by themselves, and how many max_tokens ended"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_OF_BATCHES = {
    "stop_choices": "that ended by themselves; none where nobody has counted",
    "length_choices": "that max_tokens ended; none where nobody has counted",
}


def upgrade() -> None:
    """Adds columns that are empty: no row is rewritten, and what was answered before stays uncounted."""
    for name, comment in _OF_BATCHES.items():
        op.add_column("batches", sa.Column(name, sa.BigInteger(), nullable=True, comment=comment))
