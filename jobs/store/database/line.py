"""The line in which writers of one SQLite file wait: the first to come is the first to begin, however busy the others.

SQLite's own lock goes to the writer that asks at the right moment, and a writer asks less often the longer it has
waited. So a writer first stands in line, and begins its transaction at the head of it. The line is a courtesy: a writer
that is kept waiting in it for too long (by a process that was stopped there, say), or cannot use its file, goes on
without it, and SQLite's lock alone decides. A place is a byte of the line's file, locked by its holder; a process that
dies lets go of it.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_POLL_SECONDS = 0.005
#: The byte that is held while the last place is read and raised; places begin behind the next one.
_COUNTER = 0
_COUNTER_BYTES = 8
_PLACES = 2**48


class WriterLine:
    """One line, by its file. `most_seconds`: the longest that anyone waits in it."""

    def __init__(self, path: Path, *, most_seconds: float) -> None:
        self._path = path
        self._most_seconds = most_seconds

    @contextmanager
    def head(self) -> Iterator[None]:
        """Waits for all writers that came before; those that come later wait until the block ends."""
        file = self._open()
        if file is None:
            yield
            return
        try:
            with suppress(OSError):
                self._wait(file)
            yield
        finally:
            with suppress(OSError):
                _lock(file, fcntl.F_UNLCK)  # a child that was forked meanwhile has the file open too
            os.close(file)

    def _open(self) -> int | None:
        if not hasattr(fcntl, "F_OFD_SETLK"):
            return None  # Linux alone has locks of this kind
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError:
            return None

    def _wait(self, file: int) -> None:
        end = time.monotonic() + self._most_seconds
        _poll_lock(file, fcntl.F_WRLCK, _COUNTER, 1, until=end)
        place = max(2, (int.from_bytes(os.pread(file, _COUNTER_BYTES, 0)) + 1) % _PLACES)
        os.pwrite(file, place.to_bytes(_COUNTER_BYTES), 0)
        _lock(file, fcntl.F_WRLCK, place, 1)
        _lock(file, fcntl.F_UNLCK, _COUNTER, 1)
        _poll_lock(file, fcntl.F_RDLCK, 1, place - 1, until=end)  # all places before


def _poll_lock(file: int, kind: int, first: int, count: int, *, until: float) -> None:
    """Takes a lock as soon as it is free. Raises TimeoutError."""
    while not _lock(file, kind, first, count):
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(_POLL_SECONDS)


def _lock(file: int, kind: int, first: int = 0, count: int = 0) -> bool:
    """Locks bytes of an open file, or lets go of them (0: all); False where another has locked some.

    Such locks belong to the open file, so that threads of one process keep each other out as well.
    """
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, first, count, 0))
    except BlockingIOError:
        return False
    return True
