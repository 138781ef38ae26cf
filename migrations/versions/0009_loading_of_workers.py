"""since when a worker's child loads, and what of that time torch took"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_OF_WORKERS = {
    "loading_since": "when its newest child began to load",
    "torch_load_seconds": "what torch and its kin took that child to import; none until they are there",
}


def upgrade() -> None:
    """Adds columns that are empty: of a worker that lives meanwhile it is not known until it loads again."""
    for name, comment in _OF_WORKERS.items():
        op.add_column("workers", sa.Column(name, sa.Float(), nullable=True, comment=comment))
