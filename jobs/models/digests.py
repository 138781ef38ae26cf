"""Digests: the SHA-256 of a folder's files, each hashed once in a home and remembered until it changes.

An unchanged file is recognized by its size, its times and its inode. One process hashes a folder at a time, so that
the workers of one machine do not read the same weights beside each other. It does not know what the files are.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from filelock import BaseFileLock, FileLock, Timeout

from batchmill.jobs.errors import ModelError
from batchmill.jobs.runtime.files.locks import held_by
from batchmill.jobs.runtime.logs import get_logger
from batchmill.jobs.runtime.sizes import size
from batchmill.jobs.runtime.waiting import telling

log = get_logger(__name__)
_FORMAT = 1
_READ_BYTES = 1 << 20
_AT_ONCE = 4
_PROGRESS_SECONDS = 1.0
#: Two changes within this time may leave the same timestamps, so a file this new is not remembered.
_SETTLED_SECONDS = 2.0
#: Fewer bytes are hashed without a line in the log.
_WORTH_A_LINE_BYTES = 1 << 30


class Stamp(NamedTuple):
    """Marks by which an unchanged file is recognized."""

    bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    @property
    def is_settled(self) -> bool:
        return time.time() - max(self.mtime_ns, self.ctime_ns) / 1e9 >= _SETTLED_SECONDS


class Hashed(NamedTuple):
    """A file's SHA-256, and its stamp while it was read."""

    stamp: Stamp
    sha256: str


class Digests:
    """The digests that a home remembers; without a home none are. `progress` is called about once a second."""

    def __init__(self, home: Path | None = None, *, progress: Callable[[], object] = lambda: None) -> None:
        self._folder = None if home is None else home / "digests"
        self._progress = progress
        #: True where the digests that were looked for last are kept in a newer format.
        self._is_newer = False

    def of(self, folder: Path, names: Sequence[str]) -> dict[str, Hashed]:
        """The digests of these files of a folder, by name. Raises ModelError for what cannot be read."""
        try:
            known = self._known(folder, names)
            if len(known) < len(names):
                with self._alone(folder):
                    known = self._known(folder, names)  # another process may have hashed them meanwhile
                    known |= self._hashed(folder, [each for each in names if each not in known])
                    self._remember(folder, known)
        except OSError as error:
            raise ModelError(f"cannot read the files of {folder}: {error}") from error
        return known

    def _known(self, folder: Path, names: Sequence[str]) -> dict[str, Hashed]:
        """The remembered digests of the files that have not changed since."""
        remembered = self._remembered(folder)
        unchanged = {}
        for each in names:
            stamp = Stamp.of((folder / each).stat())
            *before, sha256 = remembered.get(each, [None])
            if before == list(stamp):
                unchanged[each] = Hashed(stamp, str(sha256))
        return unchanged

    def _hashed(self, folder: Path, names: Sequence[str]) -> dict[str, Hashed]:
        bytes_ = sum((folder / each).stat().st_size for each in names)
        started, stop = time.monotonic(), Event()
        if bytes_ >= _WORTH_A_LINE_BYTES:
            log.info("hashing files, once in this home", folder=str(folder), size=size(bytes_))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            running = {each: pool.submit(_hash, folder / each, stop) for each in names}
            try:
                while wait(running.values(), timeout=_PROGRESS_SECONDS).not_done:
                    self._progress()
            finally:
                stop.set()
        if bytes_ >= _WORTH_A_LINE_BYTES:
            log.info("hashed", folder=str(folder), seconds=round(time.monotonic() - started, 1))
        return {each: one.result() for each, one in running.items()}

    @contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        lock = None if self._folder is None else self._locked(self._file(folder).with_suffix(".lock"))
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def _locked(self, file: Path) -> BaseFileLock | None:
        """The lock; None where the home takes none, and several processes may hash the same."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = FileLock(file)
            with telling(f"{file}, the lock of who hashes a folder's files", holder=lambda: held_by([file])):
                while not lock.is_locked:
                    with suppress(Timeout):
                        lock.acquire(timeout=_PROGRESS_SECONDS)
                    self._progress()
        except OSError as error:
            log.warning("digests are not kept", file=str(file), error=error.strerror)
            return None
        return lock

    def _remembered(self, folder: Path) -> Mapping[str, Sequence[Any]]:
        """`{name: [the numbers of a stamp, the digest]}`; empty where the file cannot be parsed."""
        if self._folder is None:
            return {}
        try:
            written = json.loads(self._file(folder).read_text())
            self._is_newer = written["format"] > _FORMAT
            return dict(written["files"]) if written["format"] == _FORMAT else {}
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def _remember(self, folder: Path, hashed: Mapping[str, Hashed]) -> None:
        if self._folder is None:
            return
        if self._is_newer:
            log.warning("digests of a newer batchmill are left to it, and not used", file=str(self._file(folder)))
            return
        files = {name: [*each.stamp, each.sha256] for name, each in hashed.items() if each.stamp.is_settled}
        beside = self._file(folder).with_suffix(".tmp")
        try:
            beside.write_text(json.dumps({"format": _FORMAT, "folder": str(folder), "files": files}))
            beside.replace(self._file(folder))
        except OSError as error:  # they are hashed again the next time
            log.warning("digests cannot be remembered", file=str(beside), error=error.strerror)

    def _file(self, folder: Path) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.json"


def _hash(file: Path, stop: Event) -> Hashed:
    """Hashes a file, again if it changed meanwhile, until `stop` says that nobody waits for it any more."""
    while True:
        with file.open("rb", buffering=0) as opened:
            stamp = Stamp.of(os.fstat(opened.fileno()))
            digest = hashlib.sha256()
            while not stop.is_set() and (block := opened.read(_READ_BYTES)):
                digest.update(block)
            if stop.is_set() or Stamp.of(os.fstat(opened.fileno())) == stamp:
                return Hashed(stamp, digest.hexdigest())
