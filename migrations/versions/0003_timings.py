"""timings of outputs, the logprobs of their choices, and the limits of workers"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_TIMINGS = {
    "queued_seconds": "what the request waited in the engine; none where it answers a micro-batch at once",
    "prefill_seconds": "what its prompt took",
    "decode_seconds": "what its answer took",
}


def upgrade() -> None:
    op.add_column("workers", sa.Column("engine", sa.Text(), nullable=True, comment="what serves the model"))
    for name in ("engine_rows", "context_tokens", "cache_tokens"):
        op.add_column("workers", sa.Column(name, sa.BigInteger(), nullable=True))
    for name, comment in _TIMINGS.items():
        op.add_column("outputs", sa.Column(name, sa.Float(), nullable=True, comment=comment))
    if op.get_bind().dialect.supports_comments:
        op.alter_column(
            "outputs",
            "choices",
            existing_type=sa.Text(),
            existing_nullable=False,
            existing_comment="JSON: list of {text, finish_reason}",
            comment="JSON: list of {text, finish_reason, logprobs where asked for}",
        )
