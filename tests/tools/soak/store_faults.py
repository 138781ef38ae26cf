"""Faults of the store: locked, stopped, and with a clock that is set back."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from functools import partial

from sqlalchemy import text

from batchmill.jobs.errors import StoreError
from tests.tools.soak import looks, measures
from tests.tools.soak.scene import Scene, Steps

_LOCK_TRIES = 100

_AN_HOUR_AHEAD = (
    "UPDATE batches SET lease_until = lease_until + 3600 WHERE state = 'leased'",
    "UPDATE workers SET heartbeat_at = heartbeat_at + 3600, alive_until = alive_until + 3600",
    "UPDATE jobs SET loading_until = loading_until + 3600 WHERE state = 'loading'",
)


class StoreFaults(Scene):
    """The faults of the database."""

    def store_away(self) -> Steps:
        away = self._lock_sqlite if self._world.postgresql is None else self._stop_postgresql
        count = looks.or_none(looks.outputs_count, self._world)
        with self._breaking("store"):
            yield from away()
        if isinstance(count, int):
            self._found.watch(measures.STORE_BACK, partial(looks.is_saving, self._world, count))

    def set_clock_back(self) -> Steps:
        """Every lease and sign of life is an hour ahead, as after the database's clock was set back by that.

        Each lease reads as renewed, so whoever watches it expire begins anew: a real clock would change no lease.
        """
        with self._breaking("clock"), suppress(StoreError), self._world.store.database.write() as connection:
            for statement in _AN_HOUR_AHEAD:
                connection.execute(text(statement))
            self._world.note("the store's clock set back by an hour")
        yield 0.0

    def _stop_postgresql(self) -> Steps:
        assert self._world.postgresql is not None
        seconds = self._random.uniform(10, 30)
        self._world.note(f"PostgreSQL stopped at once for {seconds:.0f} s")
        self._world.postgresql.stop_immediately()
        try:
            yield seconds
        finally:
            self._world.postgresql.start()

    def _lock_sqlite(self) -> Steps:
        seconds = self._random.uniform(5, 20)
        other = sqlite3.connect(self._world.settings.database_file, timeout=0.1, isolation_level=None)
        try:
            for _ in range(_LOCK_TRIES):
                with suppress(sqlite3.OperationalError):
                    other.execute("BEGIN EXCLUSIVE")
                    break
                yield 0.05
            self._world.note(f"SQLite locked for {seconds:.0f} s")
            yield seconds
        finally:
            other.close()
