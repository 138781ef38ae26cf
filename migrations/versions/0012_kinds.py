"""the kind of a job's requests, the kinds that workers serve, and payloads of every kind"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_PAYLOAD = "JSON: list of what its job's kind is answered with"


def upgrade() -> None:
    """Adds columns with defaults and renames one: no row is rewritten, and an index or a constraint stays as it is."""
    kind = sa.Column(
        "kind", sa.Text(), nullable=False, server_default=sa.text("'generation'"), comment="of all of its requests"
    )
    op.add_column("jobs", kind)
    kinds = sa.Column(
        "kinds",
        sa.Text(),
        nullable=False,
        server_default=sa.text("'[\"generation\"]'"),
        comment="JSON: list of the kinds of requests that its engine serves",
    )
    op.add_column("workers", kinds)
    # Alembic would copy the table on SQLite, the largest of all; either database renames by its catalogue alone.
    op.execute("ALTER TABLE outputs RENAME COLUMN choices TO payload")
    if op.get_bind().dialect.supports_comments:
        op.alter_column(
            "outputs",
            "payload",
            existing_type=sa.Text(),
            existing_nullable=False,
            existing_comment="JSON: list of {text, finish_reason, logprobs where asked for}",
            comment=_PAYLOAD,
        )
