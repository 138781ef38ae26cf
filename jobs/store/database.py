"""Connections and transactions of the store, on SQLite and PostgreSQL; foreign errors become ours here alone.

What is written knows of no tables: `read()` and `write()` give a connection inside a transaction.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, create_engine, event, func, select
from sqlalchemy.dialects.postgresql import insert as insert_postgresql
from sqlalchemy.dialects.sqlite import insert as insert_sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError, TimeoutError
from sqlalchemy.schema import Table

from jobs.errors import StoreBusy, StoreError, StoreFull, StoreUnavailable
from jobs.store.clock import StoreClock

#: An older SQLite can corrupt a WAL database when two connections write and checkpoint at once.
WAL_SAFE_SINCE = (3, 51, 3)
_CACHE_KIB = 64 * 1024
_CONNECT_SECONDS = 5
#: PostgreSQL: a session of ours that waits longer than this for a lock or a statement is in trouble.
_POSTGRESQL_OPTIONS = (
    "-c timezone=UTC -c lock_timeout=30s -c statement_timeout=120s -c idle_in_transaction_session_timeout=60s"
)
#: A connection whose other end is silent (a network that drops everything) breaks after about so long.
_POSTGRESQL_LIVENESS = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}


class Database:
    """One database: an engine, its clock, and transactions.

    `now` is the clock, an SQL expression in seconds since 1970; a test may pass its own.
    """

    def __init__(self, url: str, *, busy_seconds: float = 30.0, now: ColumnElement[float] | None = None) -> None:
        self.url = make_url(url)
        self.now: ColumnElement[float] = StoreClock() if now is None else now
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._engine = self._sqlite(busy_seconds) if self.is_sqlite else self._postgresql()

    @property
    def name(self) -> str:
        """The URL without its password and options, among which another may be."""
        return self.url.set(query={}).render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection in a transaction that only reads; keep it short and fetch everything at once."""
        with self.translated(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A connection in a transaction that commits at the end, or rolls back when an error passes through.

        On SQLite the transaction holds the write lock from its first statement (BEGIN IMMEDIATE).
        """
        with self.translated(), self._engine.connect() as plain:
            connection = plain.execution_options(writes=True)
            with connection.begin():
                yield connection

    def alone(self, connection: Connection, what: str) -> None:
        """Until the transaction ends no other one gets past the same line with the same word; it waits."""
        if not self.is_sqlite:  # where writers are alone anyway
            key = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], signed=True)
            connection.execute(select(func.pg_advisory_xact_lock(key)))

    def insert(self, table: Table) -> Any:
        """An INSERT of this dialect, which can say `on_conflict_do_nothing`."""
        return insert_sqlite(table) if self.is_sqlite else insert_postgresql(table)

    def larger(self, one: ColumnElement[Any], other: object) -> ColumnElement[Any]:
        """The larger of two expressions."""
        greatest = func.max if self.is_sqlite else func.greatest
        return greatest(one, other)

    def close(self) -> None:
        self._engine.dispose()

    def _sqlite(self, busy_seconds: float) -> Engine:
        engine = create_engine(
            self.url, pool_reset_on_return=None, hide_parameters=True, connect_args={"timeout": busy_seconds}
        )

        @event.listens_for(engine, "connect")
        def configure(connection: sqlite3.Connection, _record: object) -> None:
            connection.isolation_level = None  # transactions begin where SQLAlchemy says so, below
            journal = "WAL" if sqlite3.sqlite_version_info >= WAL_SAFE_SINCE else "TRUNCATE"
            for pragma in (
                f"busy_timeout={int(busy_seconds * 1000)}",
                f"journal_mode={journal}",
                "synchronous=FULL",
                "foreign_keys=ON",
                f"cache_size=-{_CACHE_KIB}",
            ):
                connection.execute(f"PRAGMA {pragma}")

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            writes = connection.get_execution_options().get("writes")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

        return engine

    def _postgresql(self) -> Engine:
        arguments = {"connect_timeout": _CONNECT_SECONDS, "options": _POSTGRESQL_OPTIONS} | _POSTGRESQL_LIVENESS
        return create_engine(
            self.url, pool_pre_ping=True, pool_recycle=1_800, hide_parameters=True, connect_args=arguments
        )

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Foreign errors of the block become ours; for whoever brings a connection of their own, as alembic does."""
        try:
            yield
        except (DBAPIError, TimeoutError) as error:
            ours = self._ours(error)
            if ours is None:
                raise _without_rows(error).with_traceback(error.__traceback__) from None
            raise ours from None

    def _ours(self, error: DBAPIError | TimeoutError) -> StoreError | None:
        """Our error for a foreign one; None for one that is a bug of ours (a constraint, a syntax)."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        text = _first_line(cause or error)
        if "locked" in text or "lock timeout" in text or isinstance(error, TimeoutError):
            return StoreBusy(f"the store {self.name} is locked by another process ({text}); try again")
        if "disk is full" in text or "No space left" in text:
            return StoreFull(f"no space left for the store {self.name}; free some and try again")
        if "permission denied" in text:
            return StoreError(
                f"the store {self.name} refuses this to its user: {text}; see deploy/postgresql-roles.sql"
            )
        failed_over = "read-only transaction" in text  # for a while, after PostgreSQL has failed over
        if isinstance(error, OperationalError) or failed_over or getattr(error, "connection_invalidated", False):
            return StoreUnavailable(f"cannot use the store {self.name}: {text}")
        return None


def _first_line(error: BaseException) -> str:
    """What an error says first; PostgreSQL's further lines quote the row that it is about, so prompts."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _without_rows(error: DBAPIError | TimeoutError) -> DBAPIError | TimeoutError:
    """The same error with nothing of the rows in its text."""
    if isinstance(error, TimeoutError) or error.orig is None:
        return error
    return type(error)(error.statement, None, type(error.orig)(_first_line(error.orig)), hide_parameters=True)
