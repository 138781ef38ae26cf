"""what a run's worker spent on loading, which its own row forgets with its child"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_OF_RUNS = {
    "loading_since": "when the worker's child that claimed it began to load",
    "torch_load_seconds": "what torch and its kin took that child to import",
}


def upgrade() -> None:
    """Adds columns that are empty: of a run of before it is not known."""
    for name, comment in _OF_RUNS.items():
        op.add_column("runs", sa.Column(name, sa.Float(), nullable=True, comment=comment))
