"""Connections to PostgreSQL: how each is made, and how its transactions begin. None is kept during a wait.

A server has few, and each of many workers asks for some: a connection that was idle for a moment is closed, and a
caller that finds none free waits for one.
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
#: The beginning of each transaction, in one round trip. A longer wait for a lock or a statement means trouble. The
#: limits are set anew each time, since a pooler lends each transaction another session; other settings of the server,
#: the URL (`options`) or PGOPTIONS stay in force.
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
#: An idle connection is kept so long. A new one takes about 7 ms of CPU on both sides; a worker saves once a second.
_KEPT_SECONDS = 0.25
#: Even a connection in constant use is closed after so long, so that others who wait for one get their turn.
_LONGEST_SECONDS = 5.0
_OLD_AT = "old at"
#: The longest pause before the next try for a free connection.
_CROWDED_PAUSE_SECONDS = 0.2
#: Words of a server, or a pooler, that has no connection left, for anybody or for this user or database.
_CROWDED = ("too many clients", "too many connections", "connection slots are reserved", "no more connections allowed")


class BriefPool(NullPool):
    """Keeps a connection for a moment after its use: a busy caller finds it again, and a waiting one holds none."""

    def __init__(self, *arguments: Any, **words: Any) -> None:
        super().__init__(*arguments, **words)
        self._lock = threading.Lock()
        #: Each with the time at which it is closed; the last used comes last.
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
    """An engine for a store; a caller that finds no free connection waits so long for one. Needs psycopg.

    Unless `limited`, a transaction has no time limits; in a `read_only` one the server refuses every write.
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
        # A pooler reports a pid of its own. The next user of its session must not find our statements prepared in it.
        if connection.execute("SELECT pg_backend_pid()").fetchone() != (connection.info.backend_pid,):
            connection.prepare_threshold = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(f"{BEGIN if limited else BEGIN_UNLIMITED}{_READ_ONLY if read_only else ''}")

    return engine


def _connected(connect: Callable[[], Any], failure: type[Exception], most_seconds: float) -> Any:
    """A new connection. While all are taken it retries, and raises the server's error after so long."""
    end = monotonic() + most_seconds
    while True:
        try:
            return connect()
        except failure as error:
            if crowded(str(error)) is None or monotonic() >= end:
                raise
            time.sleep(random.uniform(0, _CROWDED_PAUSE_SECONDS))
