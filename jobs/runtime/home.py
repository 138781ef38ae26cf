"""BATCHMILL_HOME, the folder of the embedded store, Redis, locks and logs: made when it is first needed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from batchmill.jobs.errors import SettingsError, StoreReplaced
from batchmill.jobs.runtime.command_errors import refusal
from batchmill.jobs.runtime.files.locks import held_by
from batchmill.jobs.runtime.waiting import telling

#: The size of the trial file, which shows that a disk has space for more than a name.
_TRIAL_BYTES = 4096
#: A unix socket's path has at most 107 bytes.
_SOCKET_PATH_BYTES = 107


def make_home(home: Path) -> None:
    """Makes the folder, for its user alone. Raises SettingsError, which says why it cannot be made."""
    with _told_of(home):
        nearest_folder(home)
        home.mkdir(parents=True, exist_ok=True, mode=0o700)


def try_home(home: Path) -> None:
    """Writes a file into the folder, or into the nearest that is there, and removes it. Raises SettingsError."""
    with _told_of(home), tempfile.TemporaryFile(dir=nearest_folder(home)) as file:
        file.write(b"\0" * _TRIAL_BYTES)
        file.flush()
        os.fsync(file.fileno())


def nearest_folder(home: Path) -> Path:
    """The folder, or where it is not there yet the nearest one above it. Raises SettingsError for a file."""
    folder = home
    with _told_of(home):
        while not folder.exists():
            folder = folder.parent
    if not folder.is_dir():
        where = "is a file" if folder == home else f"lies below {folder}, which is a file"
        raise SettingsError(f"BATCHMILL_HOME={home} {where}; name a folder")
    return folder


def socket_path(home: Path) -> Path:
    """The socket of the embedded Redis of this home: in it, or in a private folder if its path is too long."""
    path = home / "redis.sock"
    if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES:
        return path
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"batchmill-{os.getuid()}-{digest}" / "redis.sock"


@contextmanager
def use_store(home: Path) -> Iterator[None]:
    """A shared lock: each process that works on the embedded store of this home holds it for as long as it does."""
    with _use_lock(home) as file:
        path = Path(file.name)
        with telling(f"{path}, the lock of who makes the store", holder=lambda: held_by([path])):
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def make_store(home: Path) -> Iterator[None]:
    """The exclusive lock under which the embedded store is made. Raises StoreReplaced where one is in use already."""
    with _use_lock(home) as file:
        _refuse_use(file, home)
        yield


def check_unused(home: Path) -> None:
    """Raises StoreReplaced where the embedded store of this home is in use; for a home without its file."""
    with suppress(FileNotFoundError), _lock_path(home).open("rb") as file:
        _refuse_use(file, home)


def _refuse_use(file: BinaryIO, home: Path) -> None:
    """Takes the lock under which the store is made."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreReplaced(
            f"the store of {home} is gone, and a worker, `run` or `up` is still at work on it: put its file back, "
            "or end them, which begins a new and empty store"
        ) from None


def _use_lock(home: Path) -> BinaryIO:
    return _lock_path(home).open("ab")


def _lock_path(home: Path) -> Path:
    return home / "store.lock"


@contextmanager
def _told_of(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingsError(
            f"BATCHMILL_HOME={home} cannot be used: {refusal(error)}; or name another folder by BATCHMILL_HOME"
        ) from None
