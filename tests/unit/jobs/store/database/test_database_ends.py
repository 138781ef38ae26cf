"""No transaction outlives its block on SQLite, also where its commit failed."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from batchmill.jobs.errors import StoreLocked
from batchmill.jobs.store.store import Store
from tests.support.store import mill


def write(store: Store) -> None:
    with store.database.write() as connection:
        connection.execute(text("UPDATE jobs SET name = name"))


@pytest.fixture
def other(sqlite_url: str) -> Store:
    """Another process's store, that waits for nobody."""
    return Store(sqlite_url, busy_seconds=0.1)


def test_a_commit_that_a_reader_keeps_out_is_taken_back_whole(sqlite_url: str, other: Store) -> None:
    store = Store(sqlite_url, busy_seconds=0.1)
    mill.load(store, 1)
    with closing(sqlite3.connect(make_url(sqlite_url).database or "", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM jobs").fetchone()
        if reader.execute("PRAGMA journal_mode").fetchone() == ("wal",):
            pytest.skip("in WAL mode no reader keeps a commit out")
        with pytest.raises(StoreLocked):
            write(store)
        other.jobs.jobs(most=1)  # a commit that waits on for its lock would let no new reader in
        reader.execute("COMMIT")
    write(other)
    write(store)
