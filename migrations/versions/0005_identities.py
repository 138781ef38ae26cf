"""what the models and the adapters of jobs, workers and evaluations consist of"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_IDENTITIES = {
    "jobs": "what its model consists of, set by the first worker",
    "workers": "what the model consists of that its newest child holds; none while it loads",
    "evaluations": "what the model consisted of",
}
_ADAPTERS = {"jobs": ", each set by the first worker that used it", "workers": " that it holds"}


def upgrade() -> None:
    for table, comment in _IDENTITIES.items():
        op.add_column(table, sa.Column("identity", sa.Text(), nullable=True, comment=comment))
    if op.get_bind().dialect.supports_comments:
        for table, rest in _ADAPTERS.items():
            op.alter_column(
                table,
                "adapters",
                existing_type=sa.Text(),
                existing_nullable=True,
                existing_comment=f"JSON: {{name: {{path, revision}}}}{rest}",
                comment=f"JSON: {{name: {{path, revision, identity}}}}{rest}",
            )
