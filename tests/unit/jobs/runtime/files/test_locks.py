"""The holder of a lock, as the system tells it, for real processes that hold one."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from batchmill.jobs.runtime.files.locks import held_by, sqlite_held_by
from tests.support.processes.holding import file_lock, reader, transaction

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no other system tells who holds a lock")


@pytest.fixture(params=["TRUNCATE", "WAL"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "a database.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode={request.param}")
        connection.execute("CREATE TABLE numbers (number INTEGER)")
        connection.commit()
    return path


@pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_who_writes_into_a_database_is_named(database: Path, begin: str) -> None:
    assert sqlite_held_by(database) is None
    with transaction(database, begin) as pid:
        assert sqlite_held_by(database) == f"pid {pid}"
    assert sqlite_held_by(database) is None


def test_who_reads_a_database_keeps_nobody_from_writing(database: Path) -> None:
    with reader(database):
        assert sqlite_held_by(database) is None


def test_a_writer_of_this_process_is_not_named(database: Path) -> None:
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        assert sqlite_held_by(database) is None


def test_who_asks_gives_up_no_lock_of_its_own(database: Path) -> None:
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        sqlite_held_by(database)
        other = sqlite3.connect(database, isolation_level=None, timeout=0)
        with closing(other), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")


def test_who_holds_the_lock_of_a_file_is_named(tmp_path: Path) -> None:
    path, other = tmp_path / "a.lock", tmp_path / "b.lock"
    with file_lock(path) as pid:
        assert held_by([path]) == f"pid {pid}"
        assert held_by([other]) is None
        with file_lock(other) as another:
            assert held_by([path, other]) == ", ".join(f"pid {each}" for each in sorted([pid, another]))
        with FileLock(other):
            assert held_by([path, other]) is None, "one that holds one of them itself waits for nobody"
    assert held_by([path]) is None


def test_what_is_not_there_is_held_by_nobody(tmp_path: Path) -> None:
    assert held_by([tmp_path / "missing"]) is None
    assert sqlite_held_by(tmp_path / "missing.db") is None


def test_a_process_that_has_ended_is_not_named_though_a_child_keeps_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    code = (
        "import fcntl, os, sys\nheld = open(sys.argv[1], 'w')\nfcntl.flock(held, fcntl.LOCK_EX)\n"
        "os._exit(0) if os.fork() else sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE) as process:
        process.wait()
        with pytest.raises(Timeout):
            FileLock(path, timeout=0).acquire()
        assert held_by([path]) is None
