"""Connections and transactions of the store, on SQLite and PostgreSQL; foreign errors become ours here alone.

It knows no tables: `read()` and `write()` give a connection inside a transaction.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, create_engine, event, func, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, OperationalError, TimeoutError
from sqlalchemy.schema import Table

from batchmill.jobs.errors import (
    SettingsError,
    StoreConflict,
    StoreCrowded,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreReplaced,
    StoreUnavailable,
)
from batchmill.jobs.runtime.files.locks import sqlite_held_by
from batchmill.jobs.runtime.process.interrupts import interrupts_later
from batchmill.jobs.runtime.waiting import Wait, telling
from batchmill.jobs.store.database.clock import StoreClock
from batchmill.jobs.store.database.driver_errors import advice, damage, first_line, without_rows
from batchmill.jobs.store.database.line import WriterLine
from batchmill.jobs.store.database.postgresql import crowded, postgresql_engine

#: An older SQLite can corrupt a WAL database when two connections write and checkpoint at once.
WAL_SAFE_SINCE = (3, 51, 3)
_CACHE_KIB = 64 * 1024
#: SQLite: the longest that a writer waits for its place in line, before it waits for the lock itself.
_LINE_SECONDS = 2.0
#: PostgreSQL's codes for a transaction that it could not serialize, and for a deadlock's victim.
_CONFLICTS = ("40001", "40P01")


class Database:
    """One database: an engine, its clock, and transactions. The file of SQLite is opened, never made.

    `now`: the clock, an SQL expression in seconds since 1970; a test may pass its own.
    `read_only`: no statement writes, not even what SQLite keeps about its journal.
    """

    def __init__(
        self,
        url: str,
        *,
        busy_seconds: float = 30.0,
        now: ColumnElement[float] | None = None,
        read_only: bool = False,
    ) -> None:
        self.url = make_url(url)
        self.now: ColumnElement[float] = StoreClock() if now is None else now
        #: SQLite: the file that was opened first.
        self._file: tuple[int, int] | None = None
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._read_only = read_only
        #: The URL without its password and options, among which another may be.
        self.name = self.url.set(query={}).render_as_string(hide_password=True)
        self._engine = self._sqlite(busy_seconds) if self.is_sqlite else self._postgresql(busy_seconds)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection in a transaction that only reads; keep it short and fetch everything at once."""
        with (
            interrupts_later(),
            self.translated(),
            self._told() as wait,
            self._engine.connect() as connection,
            connection.begin(),
        ):
            wait.works()
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A connection in a transaction that commits at the end, or rolls back when an error passes through.

        On SQLite the transaction holds the write lock from its first statement (BEGIN IMMEDIATE), and writers get it
        in the order in which they ask.
        """
        with interrupts_later(), self.translated(), self._told() as wait, self._engine.connect() as plain:
            connection = plain.execution_options(writes=True)
            with connection.begin():
                wait.works()
                yield connection

    def alone(self, connection: Connection, what: str) -> None:
        """Takes the lock named `what` until the transaction ends; another transaction that asks for it waits."""
        if not self.is_sqlite:  # where writers are alone anyway
            key = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], signed=True)
            connection.execute(select(func.pg_advisory_xact_lock(key)))

    def insert(self, table: Table) -> Any:
        """An INSERT of this dialect, which can say `on_conflict_do_nothing`."""
        if self.is_sqlite:
            from sqlalchemy.dialects.sqlite import insert as insert_sqlite

            return insert_sqlite(table)
        from sqlalchemy.dialects.postgresql import insert as insert_postgresql  # a tenth of SQLAlchemy's import time

        return insert_postgresql(table)

    def larger(self, one: ColumnElement[Any], other: object) -> ColumnElement[Any]:
        """The larger of two expressions."""
        greatest = func.max if self.is_sqlite else func.greatest
        return greatest(one, other)

    @property
    def is_absent(self) -> bool:
        """True for a SQLite store whose file is not there; only an upgrade makes it."""
        return self.is_sqlite and _file_of(self.url) is None

    def check_encoding(self) -> None:
        """Raises StoreError for a database that cannot hold every text, with the command that makes one."""
        if self.is_absent:
            return
        ask = "PRAGMA encoding" if self.is_sqlite else "SHOW server_encoding"
        with self.read() as connection:
            encoding = connection.exec_driver_sql(ask).scalar_one()
        if encoding in ("UTF8", "UTF-8"):
            return
        make = "`createdb --encoding=UTF8 --template=template0 --locale=C NAME`"
        raise StoreError(
            f"the store {self.name} is encoded in {encoding}, which does not keep every text; make another"
            f"{'' if self.is_sqlite else f', {make},'} and name it by BATCHMILL_DATABASE_URL"
        )

    def check_writable(self) -> None:
        """Raises StoreError for a database that takes no transaction that writes."""
        with self.write() as connection:
            read_only = not self.is_sqlite and connection.exec_driver_sql("SHOW transaction_read_only").scalar_one()
        if read_only == "on":
            raise StoreError(f"the store {self.name} is read-only: name the server that writes")

    def close(self) -> None:
        self._engine.dispose()
        self._file = None

    def _told(self) -> AbstractContextManager[Wait]:
        """Reports a transaction that waits: while it cannot begin, and after that where a holder is known."""
        return telling(f"the store {self.name}", holder=self._holder)

    def _holder(self) -> str | None:
        """Other processes that keep a transaction waiting, for people; PostgreSQL's are unknown."""
        return sqlite_held_by(Path(self.url.database or "")) if self.is_sqlite else None

    def _check_file(self) -> None:
        """Raises StoreReplaced where the store's file is not the one that this process opened."""
        if self._file is not None and _file_of(self.url) != self._file:
            raise StoreReplaced(
                f"the file of the store {self.name} was deleted or replaced while this process used it; "
                "put it back, or start anew with what is there now"
            )

    def _sqlite(self, busy_seconds: float) -> Engine:
        # The pool rolls back what it gets back: nothing else ends a transaction whose commit failed.
        engine = create_engine(self.url, hide_parameters=True, connect_args={"timeout": busy_seconds})

        @event.listens_for(engine, "do_connect")
        def open_existing(_dialect: object, _record: object, args: list[Any], options: dict[str, Any]) -> None:
            self._check_file()
            if not options.get("uri"):
                args[0] = f"{Path(args[0]).absolute().as_uri()}?mode={'ro' if self._read_only else 'rw'}"
                options["uri"] = True

        @event.listens_for(engine, "connect")
        def configure(connection: sqlite3.Connection, _record: object) -> None:
            connection.isolation_level = None  # transactions begin where SQLAlchemy says so, below
            connection.execute(f"PRAGMA busy_timeout={int(busy_seconds * 1000)}")
            connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            if not self._read_only:
                journal = "WAL" if sqlite3.sqlite_version_info >= WAL_SAFE_SINCE else "TRUNCATE"
                for pragma in (f"journal_mode={journal}", "synchronous=FULL", "foreign_keys=ON"):
                    connection.execute(f"PRAGMA {pragma}")
            self._file = self._file or _file_of(self.url)

        line = WriterLine(
            Path(f"{self.url.database}-line").absolute(), most_seconds=min(_LINE_SECONDS, busy_seconds / 2)
        )

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            self._check_file()
            if not connection.get_execution_options().get("writes"):
                connection.exec_driver_sql("BEGIN")
                return
            with line.head():
                connection.exec_driver_sql("BEGIN IMMEDIATE")

        return engine

    def _postgresql(self, busy_seconds: float) -> Engine:
        try:
            return postgresql_engine(self.url, busy_seconds=busy_seconds, read_only=self._read_only)
        except ModuleNotFoundError as error:
            raise SettingsError(
                f"the store {self.name} needs {error.name}, which is not installed: `pip install 'batchmill[postgres]'`"
            ) from error

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turns foreign errors of the block into ours; for callers with a connection of their own, such as alembic."""
        try:
            yield
        except (DBAPIError, TimeoutError) as error:
            ours = self._ours(error)
            if ours is None:
                raise without_rows(error).with_traceback(error.__traceback__) from None
            raise ours from None

    def _ours(self, error: DBAPIError | TimeoutError) -> StoreError | None:
        """Our error for a foreign one; None for one that is a bug of ours (a constraint, a syntax)."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        text = first_line(cause or error)
        if getattr(cause, "sqlstate", None) in _CONFLICTS:
            return StoreConflict(f"the store {self.name} is busy: {text}; try again")
        if isinstance(error, DBAPIError) and error.statement is None and (line := crowded(str(cause))):
            return StoreCrowded(
                f"the store {self.name} has no connection left ({line}): raise max_connections of its server, or stop "
                "some of who use it; a worker needs up to four at once, see deploy/README.md"
            )
        if "locked" in text or "lock timeout" in text or isinstance(error, TimeoutError):
            who = self._holder() or "another connection"
            return StoreLocked(f"the store {self.name} is locked by {who} ({text}); try again", holder=who)
        if isinstance(cause, sqlite3.Error) and (harm := damage(cause, self.name)):
            return StoreError(harm)
        if "disk is full" in text or "No space left" in text:
            return StoreFull(f"no space left for the store {self.name}; free some and try again")
        if "permission denied" in text:
            return StoreError(
                f"the store {self.name} refuses this to its user: {text}; see deploy/postgresql-roles.sql"
            )
        failed_over = "read-only transaction" in text  # for a while, after PostgreSQL has failed over
        if isinstance(error, OperationalError) or failed_over or getattr(error, "connection_invalidated", False):
            return StoreUnavailable(f"cannot use the store {self.name}: {text}{advice(cause)}")
        return None


def _file_of(url: URL) -> tuple[int, int] | None:
    """The file of a SQLite store, by device and inode; None where there is none."""
    try:
        status = os.stat(url.database or "")
    except OSError:
        return None
    return status.st_dev, status.st_ino
