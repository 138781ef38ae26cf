"""Connections to PostgreSQL: how each is made and its transactions begin. Nobody keeps one while it waits.

A server has few, and each of many workers asks for some: what nobody used for a moment is closed, and who finds none
free waits for one.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.pool import NullPool
from sqlalchemy.pool.base import ConnectionPoolEntry

#: Prompts and answers are any text, whatever PGCLIENTENCODING or the locale says.
_TEXT = {"client_encoding": "utf8"}
#: How each transaction begins, in one round trip. Who waits longer than these limits for a lock or a statement is in
#: trouble. They are said anew each time, since a pooler lends each transaction another session, and whatever the
#: server, the URL (`options`) or PGOPTIONS say of other things holds beside them.
BEGIN_UNLIMITED = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL timezone = 'UTC'"
BEGIN = (
    f"{BEGIN_UNLIMITED}; SET LOCAL lock_timeout = '30s'; "
    "SET LOCAL statement_timeout = '120s'; SET LOCAL idle_in_transaction_session_timeout = '60s'"
)
_READ_ONLY = "; SET TRANSACTION READ ONLY"
_CONNECT_SECONDS = 5
#: A connection whose other end is silent (a network that drops everything) breaks after about so long.
_LIVENESS = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
#: To connect anew takes about 7 ms of processors, here and there together; a worker at work saves once a second.
_KEPT_SECONDS = 0.25
#: Even who uses one all the time gives it back after so long, so that others who wait for one get their turn.
_LONGEST_SECONDS = 5.0
_OLD_AT = "old at"
#: Who finds no free connection tries again within so long.
_CROWDED_PAUSE_SECONDS = 0.2
#: What a server, or a pooler, says that has no connection left, for anybody or for this user or database.
_CROWDED = ("too many clients", "too many connections", "connection slots are reserved", "no more connections allowed")


class BriefPool(NullPool):
    """Keeps a connection for a moment after its use: who goes on finds it again, and who waits holds none."""

    def __init__(self, *arguments: Any, **words: Any) -> None:
        super().__init__(*arguments, **words)
        self._lock = threading.Lock()
        #: The last used is the last, each with the time at which it is closed.
        self._kept: list[tuple[float, ConnectionPoolEntry]] = []
        self._closer: threading.Timer | None = None

    def _do_get(self) -> ConnectionPoolEntry:
        with self._lock:
            if self._kept:
                return self._kept.pop()[1]
        return self._create_connection()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if monotonic() >= record.info.get(_OLD_AT, 0.0):
            record.close()
            return
        with self._lock:
            self._kept.append((monotonic() + _KEPT_SECONDS, record))
            if self._closer is None:
                self._close_later()

    def dispose(self) -> None:
        self._close_until(float("inf"))

    def _close_later(self) -> None:
        self._closer = threading.Timer(max(0.0, self._kept[0][0] - monotonic()), self._close_due)
        self._closer.daemon = True
        self._closer.start()

    def _close_due(self) -> None:
        self._close_until(monotonic())
        with self._lock:
            self._closer = None
            if self._kept:
                self._close_later()

    def _close_until(self, end: float) -> None:
        with self._lock:
            due = [record for closes_at, record in self._kept if closes_at <= end]
            self._kept = self._kept[len(due) :]
        for record in due:
            record.close()


def crowded(text: str) -> str | None:
    """The line of a failed connection's text by which a server says that it has none left; it may be one of several."""
    return next((line for line in text.splitlines() if any(each in line for each in _CROWDED)), None)


def postgresql_engine(url: URL, *, busy_seconds: float, limited: bool = True, read_only: bool = False) -> Engine:
    """An engine for a store; who finds no free connection waits so long for one. Needs psycopg.

    Unless `limited`, a transaction takes as long as it takes; in a `read_only` one the server refuses every write.
    """
    # Transactions begin where SQLAlchemy says so, below: "autocommit" keeps the driver from beginning its own.
    arguments: dict[str, Any] = {"autocommit": True, "connect_timeout": _CONNECT_SECONDS}
    arguments |= _LIVENESS | _TEXT
    engine = create_engine(url, poolclass=BriefPool, pool_pre_ping=True, hide_parameters=True, connect_args=arguments)

    @event.listens_for(engine, "do_connect")
    def wait_for_one(dialect: Any, _record: object, words: Any, options: Any) -> Any:
        connect = partial(dialect.connect, *words, **options)
        return _connected(connect, dialect.loaded_dbapi.OperationalError, busy_seconds)

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: ConnectionPoolEntry) -> None:
        record.info[_OLD_AT] = monotonic() + _LONGEST_SECONDS
        # A pooler says a pid of its own. Who gets its session next must not find our statements prepared in it.
        if connection.execute("SELECT pg_backend_pid()").fetchone() != (connection.info.backend_pid,):
            connection.prepare_threshold = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(f"{BEGIN if limited else BEGIN_UNLIMITED}{_READ_ONLY if read_only else ''}")

    return engine


def _connected(connect: Callable[[], Any], failure: type[Exception], most_seconds: float) -> Any:
    """A new connection. While all are taken it tries again, and raises what the server said after so long."""
    end = monotonic() + most_seconds
    while True:
        try:
            return connect()
        except failure as error:
            if crowded(str(error)) is None or monotonic() >= end:
                raise
            time.sleep(random.uniform(0, _CROWDED_PAUSE_SECONDS))
