"""Alembic's entry: runs the migrations on one connection, in one transaction."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, pool
from sqlalchemy.engine import make_url

from batchmill.jobs.store.database.postgresql import postgresql_engine
from batchmill.jobs.store.tables import metadata

_BUSY_SECONDS = 30.0

url = make_url(context.config.attributes["url"])
if url.get_backend_name() == "postgresql":
    engine = postgresql_engine(url, busy_seconds=_BUSY_SECONDS, limited=False)
else:
    engine = create_engine(url, poolclass=pool.NullPool)
with engine.connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=True,
        compare_type=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        if connection.dialect.name == "sqlite":
            # Python begins a transaction for rows alone: each change of a table would commit by itself.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        context.run_migrations()
engine.dispose()
