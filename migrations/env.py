"""Alembic's entry: runs the migrations on one connection, in one transaction."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, pool

from jobs.tables import metadata

engine = create_engine(context.config.attributes["url"], poolclass=pool.NullPool)
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
            # Python begins a transaction for rows alone: each change of a table would stand by itself.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        context.run_migrations()
