"""Processes that hold what others wait for, until a test lets them go."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SQLITE = """
import sqlite3
held = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=300)
held.execute(sys.argv[2])
"""
_READ = """
import sqlite3
held = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=300)
held.execute("BEGIN")
held.execute("SELECT count(*) FROM sqlite_master").fetchall()
"""
_FILE = """
from filelock import FileLock
held = FileLock(sys.argv[1])
held.acquire()
"""


@contextmanager
def _process(code: str, *words: str | Path) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{code}\nprint(flush=True); sys.stdin.read()", *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n", "it holds what it was to hold"
        yield process.pid
    finally:
        process.communicate()


@contextmanager
def transaction(database: Path, begin: str = "BEGIN IMMEDIATE") -> Iterator[int]:
    """A transaction of another process on a SQLite database: its pid."""
    with _process(_SQLITE, database, begin) as pid:
        yield pid


@contextmanager
def reader(database: Path) -> Iterator[int]:
    """A transaction of another process that has read from a SQLite database: its pid."""
    with _process(_READ, database) as pid:
        yield pid


@contextmanager
def file_lock(path: Path) -> Iterator[int]:
    """A lock of another process: its pid."""
    with _process(_FILE, path) as pid:
        yield pid
