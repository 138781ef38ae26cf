"""Locks of files, and their holders: Linux lists them in /proc/locks, and elsewhere they stay unknown.

No file is opened to ask: to close it again would give up the process's POSIX locks, on which SQLite relies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from filelock import BaseFileLock

from batchmill.jobs.runtime.waiting import telling

_LOCKS = Path("/proc/locks")
#: A lock that is held; one that is waited for has an arrow in front. A lock of an open file (OFD) names no process.
_HELD = re.compile(
    r"\d+: +(?:POSIX|FLOCK) +\S+ +(?P<kind>READ|WRITE) +(?P<pid>\d+)"
    r" (?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+):(?P<inode>\d+) (?P<first>\d+) (?P<last>\d+|EOF)"
)
#: SQLite's locks: bytes of its file in which readers and writers meet, and those of the file beside it in WAL mode.
_PENDING, _SHARED_END = 0x40000000, 0x40000000 + 511
_WAL_WRITE, _WAL_RECOVER = 120, 122
_MOST_NAMED = 3


def acquire(lock: BaseFileLock, what: str) -> None:
    """Takes a lock, and tells of a long wait for it. Raises filelock's Timeout."""
    file = Path(lock.lock_file)
    with telling(f"{file}, the lock of {what}", holder=lambda: held_by([file])):
        lock.acquire()


def held_by(files: Iterable[Path]) -> str | None:
    """Other processes that hold locks of these files, for people; None where there are none, or none is known.

    None, too, for a process that holds one of the locks itself.
    """
    pids = {pid for each in files for pid, _, _ in _locks(each)}
    return None if os.getpid() in pids else _named(pids)


def sqlite_held_by(file: Path) -> str | None:
    """Other processes that keep this one from writing into a SQLite database, or from its commit, for people."""
    locks = list(_locks(file, (_PENDING, _SHARED_END)))
    writing = {pid for pid, kind, _ in locks if kind == "WRITE"}
    if os.getpid() in writing and any(kind == "WRITE" and first == _PENDING for _, kind, first in locks):
        writing = {pid for pid, kind, _ in locks if kind == "READ"}  # it waits for them to end
    beside = file.with_name(f"{file.name}-shm")
    for byte in (_WAL_WRITE, _WAL_RECOVER):
        writing |= {pid for pid, kind, _ in _locks(beside, (byte, byte)) if kind == "WRITE"}
    return _named(writing - {os.getpid()})


def _locks(file: Path, within: tuple[int, int] | None = None) -> list[tuple[int, str, int]]:
    """The locks of a file that touch these bytes: pid, kind and first byte of each."""
    try:
        meant, lines = os.stat(file), _LOCKS.read_text().splitlines()
    except OSError:
        return []
    locks = []
    for held in filter(None, map(_HELD.match, lines)):
        device = os.makedev(int(held["major"], 16), int(held["minor"], 16))
        if (device, int(held["inode"])) != (meant.st_dev, meant.st_ino):
            continue
        first, last = int(held["first"]), float(held["last"].replace("EOF", "inf"))
        if within is None or (first <= within[1] and last >= within[0]):
            locks.append((int(held["pid"]), held["kind"], first))
    return locks


def _named(pids: set[int]) -> str | None:
    """These processes, for people, without those that have ended while a child keeps their lock."""
    living = sorted(pid for pid in pids if Path(f"/proc/{pid}").exists())
    shown = [f"pid {pid}" for pid in living[:_MOST_NAMED]]
    more = [f"{len(living) - len(shown)} more"] if len(living) > len(shown) else []
    return ", ".join([*shown, *more]) or None
